"""--dry_run: check everything, take one real step in a child process, say what it cost, write nothing."""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from metric_kd.cli.config import default_save_dir
from metric_kd.cli.parse import parse
from metric_kd.cli.session import Session, build, make_batches, make_settings, make_task
from metric_kd.engine.memory import peak_memory
from metric_kd.engine.optimisation import make_optimizer
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.errors import UserError

MIB = 2**20


def dry_run(command: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Print and return what one step cost; raises what the run itself would have refused."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(command, list(arguments), there))
    child.start()
    there.close()
    try:
        outcome = here.recv()
    except EOFError:
        child.join()
        raise UserError(
            f"the trial step died with exit code {child.exitcode}, most likely out of memory; use a smaller --batch."
        ) from None
    child.join()
    if "error" in outcome:
        raise UserError(outcome["error"])
    for note in outcome["notes"]:
        print(note)
    print(outcome["summary"])
    return dict(outcome)


def _measure(command: str, arguments: list[str], pipe: Connection) -> None:
    try:
        pipe.send(_one_step(command, arguments))
    except UserError as error:
        pipe.send({"error": str(error)})


def _one_step(command: str, arguments: list[str]) -> dict[str, Any]:
    session = build(parse(command, arguments))
    try:
        return _measured(command, session)
    finally:
        session.close()


def _measured(command: str, session: Session) -> dict[str, Any]:
    run = RunDirectory(session.config.save_dir or default_save_dir(command, session.config))
    run.check_writable()
    task = make_task(session)
    order = make_batches(session).epoch(1)
    optimizer = make_optimizer(make_settings(session.config), task.parameters())
    before = peak_memory()
    started = time.perf_counter()
    batch = next(iter(session.train.train(order[:1], 1))).to(session.device)
    task.train()
    loss, values = task(batch)
    loss.backward()
    optimizer.step()
    text = ", ".join(f"{name} {float(value):.4f}" for name, value in values.items())
    seconds = time.perf_counter() - started
    peak = peak_memory()
    train, test = session.train.records, session.test.records
    on_device = ""
    if session.device.type == "cuda":
        on_device = f", {torch.cuda.max_memory_allocated(session.device) / MIB:.0f} MiB on the device"
    summary = (
        f"data: {len(train)} training images of {train.num_classes} classes, {len(test)} test images of {test.num_classes}\n"
        f"losses: {', '.join(session.config.loss or [])} ({text})\n"
        f"one step: {seconds:.2f} s (the first; later ones are faster), peak memory {peak / MIB:.0f} MiB of the process, "
        f"{(peak - before) / MIB:.0f} MiB of it for the step{on_device}\n"
        f"nothing was trained; the run would write {run.path}"
    )
    return {"summary": summary, "notes": session.notes, "seconds": seconds, "peak": peak}
