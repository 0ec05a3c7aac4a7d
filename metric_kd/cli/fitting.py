"""The life of a run: open its directory, resume, fit, evaluate, write the result. Shared by train and distill."""

import json
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from metric_kd import distributed
from metric_kd.cli import also_eval
from metric_kd.cli.bridging import keep_bridge
from metric_kd.cli.config import GranularityConfig, default_save_dir, to_dict
from metric_kd.cli.making import make_batches, make_settings, make_task
from metric_kd.cli.nested import nested_keys, prefix_table
from metric_kd.cli.networks import share_start
from metric_kd.cli.parse import Parsed
from metric_kd.cli.session import Session, build, checked
from metric_kd.cli.teacher_check import warnings_of
from metric_kd.cli.unlabelled import is_unlabelled
from metric_kd.data.batches import check_share
from metric_kd.engine import compiling
from metric_kd.engine.checkpoint import read_checkpoint, write_text
from metric_kd.engine.logging import Observer, TensorBoard
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.engine.tasks import Task
from metric_kd.engine.trainer import BatchSampler, Trainer
from metric_kd.engine.weight_record import WeightRecord, chosen_epochs
from metric_kd.errors import UserError
from metric_kd.evaluation.search import backend
from metric_kd.models.network import Network


def fit(command: str, parsed: Parsed) -> dict[str, float]:
    """Run a training or distillation from its config to its result; returns the final metrics (fractions)."""
    parsed = checked(parsed)
    check_share(parsed.config.batch, distributed.announced())
    config = to_dict(parsed.config)
    run = RunDirectory(parsed.config.save_dir or default_save_dir(command, parsed.config))
    fresh = parsed.config.resume == "never"
    run.check_writable()
    peers = [f"peer{k}" for k in range(1, 1 + len(getattr(parsed.config, "mutual", [])))]
    run.check_own(peers)
    if not fresh:
        run.check_config(config)
        finished = run.finished(parsed.config.epochs)
        # Coders that are finished are still compared with the teacher, which may be another one now.
        if finished is not None and not isinstance(parsed.config, GranularityConfig):
            say(f"{run.path} is finished:\n{finished}")
            return dict(run.card_content()["metrics"]["best"])
    session = build(parsed)
    try:
        task = make_task(session)
        batches = make_batches(session)
        with run.locked() if distributed.is_main() else nullcontext():
            if distributed.is_main():
                run.check_own(peers)  # once more, now that nobody else writes
                if fresh:
                    run.clear()
            distributed.barrier()
            try:
                return _fit(session, run, task, batches, config)
            except UserError:
                if distributed.is_main():
                    run.discard_unstarted()
                raise
    finally:
        session.close()


def _fit(
    session: Session, run: RunDirectory, task: Task, batches: BatchSampler, config: dict[str, Any]
) -> dict[str, float]:
    loader, prefix = (session.test, "") if session.validation is None else (session.validation, "val_")
    first = next(iter(session.metrics))
    records = session.train.records
    about = {"classes": list(records.class_names)} if session.goal.head(records.num_classes) else None
    trainer = Trainer(
        task,
        make_settings(session.config, len(batches)),
        run,
        session.train,
        batches,
        session.device,
        evaluate=session.goal.evaluate(session.config, session.device, loader, prefix),
        select=None if session.config.select == "last" else f"{prefix}{first}",
        eval_every=session.config.eval_every,
        config=config,
        about=about,
    )
    trainer.environment |= {"data": session.train.records.fingerprint()}
    if isinstance(session.teacher, StoredTeacher):
        trainer.environment |= session.teacher.about
    elif session.teacher is not None:
        trainer.environment |= {"teacher": weights_digest(session.teacher), "teacher_cache": None}
    if session.config.compile:
        trainer.environment["compiled by"] = str(compiling.BACKEND)
    for note in session.notes:
        say(note)
    observers = _recorders(session, run, trainer)
    trainer.observers = observers
    extended = (run.stored_config() or {}).get("epochs", session.config.epochs) < session.config.epochs
    if trainer.resume():
        where = "" if trainer.stage_name is None else f"stage {trainer.stage_name}, "
        say(f"resuming {run.path} at {where}epoch {trainer.epoch}, step {trainer.iteration} of it")
        moving = session.config.schedule != "step" or session.config.lr_decay_at or trainer.task.stages()
        if extended and moving:
            say("more epochs than before: what follows their number (rate, schedules, stages) is another from here on")
    else:
        for warning in warnings_of(session) if distributed.is_main() else ():
            say(warning)
        say(f"training into {run.path}")
        if session.config.student_init is not None and distributed.is_main():
            share = Path(session.config.student_init)
            if not share.exists():
                assert isinstance(session.student, Network)
                share_start(session.student, share)
    if distributed.is_main():
        run.open(config)
    board = TensorBoard.if_installed(run.boards, trainer.lines, run.made) if distributed.is_main() else None
    with nullcontext() if board is None else closing(board):
        trainer.observers = [*observers, board] if board is not None else observers
        trainer.fit()
    return distributed.from_main(_finish(session, run, trainer))


def _recorders(session: Session, run: RunDirectory, trainer: Trainer) -> list[Observer]:
    """The observer that --record_weights asks for."""
    if session.config.record_weights is None:
        return []
    epochs = chosen_epochs(session.config.record_weights, trainer.total_epochs)
    student = trainer.task.student
    return [WeightRecord(student, run.weights, epochs, lambda: trainer.state_of(student), run.written)]


class Result(NamedTuple):
    """Metrics on the test images, as fractions: of the network that was chosen, and of the last epoch's."""

    best: dict[str, float]
    final: dict[str, float]
    chosen: str


def _finish(session: Session, run: RunDirectory, trainer: Trainer) -> dict[str, float]:
    """Write the networks, result.txt and, last of all, card.json; returns the metrics of the student.

    All processes measure together; the main one has the metrics, and writes.
    """
    results = {name: _result(session, run, trainer, name) for name in trainer.task.networks}
    elsewhere = _elsewhere(session, run)
    if not distributed.is_main():
        return {}
    trainer.finish({name: result.final for name, result in results.items()})
    bridged = keep_bridge(session, run)
    lines = [line for name, result in results.items() for line in _lines(session, name, result)]
    lines += [] if bridged is None else [bridged]
    lines += prefix_table(session.config, trainer.task.student, results["student"].best)
    lines += also_eval.lines_of(elsewhere)
    write_text(run.claim(run.result), "\n".join(lines) + "\n")
    write_text(
        run.claim(run.card), json.dumps({**_card(session, trainer, results), "also": elsewhere}, indent=2) + "\n"
    )
    say("\n".join([*lines, f"wrote {', '.join(str(run.best_of(name)) for name in results)}"]))
    return results["student"].best


def _elsewhere(session: Session, run: RunDirectory) -> also_eval.Elsewhere:
    """--also_eval, of the network that is the result: where it was selected on test, that is not the last epoch's."""
    student = session.student
    if session.also and session.config.select == "test":
        if distributed.is_main():
            student.load_state_dict(read_checkpoint(run.best)["model"])
        distributed.copy_from_main(student.state_dict().values())
    return also_eval.measured(session.config, session.device, session.also, student)


def _lines(session: Session, name: str, result: Result) -> list[str]:
    suffix = ", beside a best that was selected on test" if session.config.select == "test" else ""
    own = nested_keys(session.config)  # in a table of their own
    titles = [(key, title) for key, title in session.metrics.items() if key not in own]
    whose = "" if name == "student" else f"{name}: "
    lines = [f"{whose}Best {title}: {100 * result.best[key]:.4f} ({result.chosen})" for key, title in titles]
    return lines + [
        f"{whose}Final {title}: {100 * result.final[key]:.4f} (last epoch{suffix})" for key, title in titles
    ]


def _result(session: Session, run: RunDirectory, trainer: Trainer, name: str) -> Result:
    keys = list(session.metrics)
    on_test = session.goal.evaluate(session.config, session.device, session.test)
    record = distributed.from_main((run.history() or [{}])[-1] if distributed.is_main() else {})
    prefix = "" if name == "student" else f"{name}_"
    network = trainer.task.networks[name]
    stored = {key: record[f"{prefix}{key}"] for key in keys if f"{prefix}{key}" in record}
    final = stored or on_test(network)
    if session.config.select == "last":
        return Result(final, final, "last epoch")
    epoch = f"epoch {trainer.best[name]['epoch']}"
    if session.config.select == "test":
        return Result({key: trainer.best[name][key] for key in keys}, final, f"{epoch}, selected on test")
    if distributed.is_main():
        network.load_state_dict(read_checkpoint(run.best_of(name))["model"])
    distributed.copy_from_main(network.state_dict().values())
    what = "images" if session.config.task == "classification" or is_unlabelled(session.config) else "classes"
    return Result(on_test(network), final, f"{epoch}, selected on held-out training {what}")


def _card(session: Session, trainer: Trainer, results: dict[str, Result]) -> dict[str, Any]:
    config, train, test = session.config, session.train, session.test
    result = results["student"]
    others = {name: {"best": r.best, "final": r.final} for name, r in results.items() if name != "student"}
    return {
        "environment": {**trainer.environment, "search": backend()},
        "seed": config.seed,
        "epochs": config.epochs,
        "data": {
            "name": config.dataset,
            "train": [len(train.records), train.records.num_classes],
            "test": [len(test.records), test.records.num_classes],
            "fingerprint": [train.records.fingerprint(), test.records.fingerprint()],
            "skipped": len(train.skipped) + len(test.skipped),
        },
        "parameters": sum(p.numel() for p in trainer.task.student.parameters()),
        "losses": config.loss or trainer.task.loss_names,
        "selection": result.chosen,
        "task": config.task,
        "metrics": {"best": result.best, "final": result.final},
        "peers": others,
    }


def say(text: str) -> None:
    """One process speaks, without tearing progress bars."""
    if distributed.is_main():
        tqdm.write(text)
