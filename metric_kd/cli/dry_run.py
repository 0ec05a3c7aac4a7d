"""--dry_run: check everything, take one real step in a child process, say what it cost, write nothing."""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from metric_kd.cli.config import default_save_dir, to_dict
from metric_kd.cli.parse import parse
from metric_kd.cli.session import Session, build, checked, make_batches, make_settings, make_task
from metric_kd.engine.memory import peak_memory, reset_peak_memory
from metric_kd.engine.optimisation import stage_settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.trainer import Trainer
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
    except Exception as error:  # to the parent, which is where the user looks
        pipe.send({"error": f"the trial step failed with {error!r}; the run itself would fail in the same way."})


def _one_step(command: str, arguments: list[str]) -> dict[str, Any]:
    parsed = checked(parse(command, arguments))
    run = RunDirectory(parsed.config.save_dir or default_save_dir(command, parsed.config))
    run.check_writable()
    if parsed.config.resume == "auto":
        run.check_config(to_dict(parsed.config))
    session = build(parsed)
    try:
        cost = _measured(session)
    finally:
        session.close()
    train, test = session.train.records, session.test.records
    sizes = (
        f"{len(train)} training images of {train.num_classes} classes, {len(test)} test images of {test.num_classes}"
    )
    summary = f"data: {sizes}\n{cost}\nnothing was trained; the run would write {run.path}"
    return {"summary": summary, "notes": session.notes}


def _measured(session: Session) -> str:
    """One step as the trainer takes it, and what it cost, in words."""
    task = make_task(session)
    batches = make_batches(session)
    order = batches.epoch(1)
    settings = make_settings(session.config, len(order))
    trainer = Trainer(task, settings, RunDirectory("."), session.train, batches, session.device)
    trainer.enter_stage(len(trainer.stages) - 1)
    batch = next(iter(session.train.train(order[:1], 1))).to(session.device)
    before = reset_peak_memory()
    started = time.perf_counter()
    values = trainer.trial_step(batch)
    seconds, peak = time.perf_counter() - started, peak_memory()
    text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    step = f", {(peak - before) / MIB:.0f} MiB of it for the step" if before is not None else ""
    if session.device.type == "cuda":
        step += f", {torch.cuda.max_memory_allocated(session.device) / MIB:.0f} MiB on the device"
    before = [f"{stage.name} {stage_settings(settings, stage).epochs}" for _, stage in task.stages()]
    stages = f"epochs of stages before: {', '.join(before)}\n" if before else ""
    return (
        f"{stages}losses: {', '.join(session.config.loss or [])} ({text})\n"
        f"one step: {seconds:.2f} s (the first; later ones are faster), peak memory {peak / MIB:.0f} MiB of the process{step}"
    )
