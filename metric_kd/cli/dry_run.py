"""--dry_run: check everything, take one real step in a child process, say what it cost, write nothing."""

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from metric_kd import distributed
from metric_kd.cli.config import default_save_dir, to_dict
from metric_kd.cli.fitting import fit
from metric_kd.cli.making import make_batches, make_settings, make_task
from metric_kd.cli.parse import Parsed, parse
from metric_kd.cli.session import Session, build, checked
from metric_kd.cli.unlabelled import is_unlabelled
from metric_kd.engine.memory import peak_memory, reset_peak_memory
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Task
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError

MIB = 2**20


def fit_or_try(command: str, arguments: Sequence[str], parsed: Parsed) -> int:
    """What the commands that train do: the run, or with --dry_run its trial."""
    if parsed.config.dry_run:
        dry_run(command, arguments)
    else:
        fit(command, parsed)
    return 0


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
    if distributed.is_main():
        print("\n".join([*outcome["notes"], outcome["summary"]]))
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
    run.check_own()
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
    if is_unlabelled(session.config):
        sizes = f"{len(train)} training images, {len(test)} held out"
    summary = f"data: {sizes}\n{cost}\nnothing was trained; the run would write {run.path}"
    return {"summary": summary, "notes": session.notes}


def _measured(session: Session) -> str:
    """One step of every stage as the trainer takes it, and what the last and dearest cost, in words."""
    task = make_task(session)
    batches = make_batches(session)
    order = batches.epoch(1)
    settings = make_settings(session.config, len(order))
    trainer = Trainer(task, settings, RunDirectory("."), session.train, batches, session.device)
    drawn = [batch.to(session.device) for batch in session.train.train(order[: settings.accumulate], 1)]
    before = reset_peak_memory()
    lines = []
    for number in range(len(trainer.stages)):
        trainer.enter_stage(number)
        if trainer.stage_name is None:
            trainer.epoch = _busiest_epoch(session.config.epochs, task)
        started = time.perf_counter()
        values = trainer.trial_step(*drawn)
        seconds = time.perf_counter() - started
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        if trainer.stage_name is not None:
            epochs = trainer.settings.epochs
            lines.append(f"stage {trainer.stage_name}, {epochs} epochs before the main stage: {text}, {seconds:.2f} s")
    peak = peak_memory()
    step = f", {(peak - before) / MIB:.0f} MiB of it for the step" if before is not None else ""
    if session.device.type == "cuda":
        step += f", {torch.cuda.max_memory_allocated(session.device) / MIB:.0f} MiB on the device"
    lines += [
        f"losses: {', '.join(session.config.loss or task.loss_names)} ({text})",
        f"one step: {seconds:.2f} s (the first; later ones are faster), peak memory {peak / MIB:.0f} MiB of the process{step}",
    ]
    return "\n".join(lines)


def _busiest_epoch(epochs: int, task: Task) -> int:
    """The first epoch in which most losses act."""

    def acting(epoch: int) -> int:
        task.begin_epoch(epoch, epochs)
        return len(task.acting)

    return max(range(1, epochs + 1), key=acting)
