"""The life of a run: open its directory, resume, fit, evaluate, write the result. Shared by train and distill."""

import json
from contextlib import nullcontext
from typing import Any

from tqdm import tqdm

from metric_kd import distributed
from metric_kd.cli.config import default_save_dir, to_dict
from metric_kd.cli.parse import Parsed
from metric_kd.cli.session import Session, build, checked, make_batches, make_evaluate, make_settings, make_task
from metric_kd.engine.checkpoint import read_checkpoint, write_text
from metric_kd.engine.logging import TensorBoard
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.trainer import Trainer


def fit(command: str, parsed: Parsed) -> dict[str, float]:
    """Run a training or distillation from its config to its result; returns the final metrics (fractions)."""
    parsed = checked(parsed)
    config = to_dict(parsed.config)
    run = RunDirectory(parsed.config.save_dir or default_save_dir(command, parsed.config))
    fresh = parsed.config.resume == "never"
    run.check_writable()
    if not fresh:
        run.check_config(config)
        finished = run.finished(parsed.config.epochs)
        if finished is not None:
            say(f"{run.path} is finished:\n{finished}")
            return dict(run.card_content()["metrics"]["best"])
    session = build(parsed)
    try:
        task = make_task(session)
        batches = make_batches(session)
        with run.locked() if distributed.is_main() else nullcontext():
            if distributed.is_main() and fresh:
                run.clear()
            distributed.barrier()
            return _fit(session, run, task, batches, config)
    finally:
        session.close()


def _fit(session: Session, run: RunDirectory, task: Any, batches: Any, config: dict[str, Any]) -> dict[str, float]:
    on_validation = session.validation is not None
    evaluate = (
        make_evaluate(session, session.validation, "val_")
        if session.validation is not None
        else make_evaluate(session, session.test)
    )
    first = session.config.recall[0]
    select = {"last": None, "val": f"val_recall@{first}", "test": f"recall@{first}"}[session.config.select]
    trainer = Trainer(
        task,
        make_settings(session.config),
        run,
        session.train,
        batches,
        session.device,
        evaluate=evaluate,
        select=select,
        eval_every=session.config.eval_every,
        config=config,
    )
    trainer.environment |= {"data": session.train.records.fingerprint()}
    if session.teacher is not None:
        trainer.environment["teacher"] = weights_digest(session.teacher)
    for note in session.notes:
        say(note)
    extended = (run.stored_config() or {}).get("epochs", session.config.epochs) < session.config.epochs
    if trainer.resume():
        say(f"resuming {run.path} at epoch {trainer.epoch}, step {trainer.iteration} of it")
        if extended and session.config.schedule == "cosine":
            say("more epochs than before: the cosine schedule is another one from here on")
    else:
        say(f"training into {run.path}")
    if distributed.is_main():
        run.open(config)
    board = TensorBoard.if_installed(run.path / "tensorboard", trainer.epoch) if distributed.is_main() else None
    trainer.observers = [board] if board is not None else []
    trainer.fit()
    return _finish(session, run, trainer, on_validation)


def _finish(session: Session, run: RunDirectory, trainer: Trainer, on_validation: bool) -> dict[str, float]:
    """Write best.pth, result.txt and, last of all, card.json."""
    metrics: dict[str, float] = {}
    if distributed.is_main():
        keys = [f"recall@{k}" for k in session.config.recall]
        on_test = make_evaluate(session, session.test)
        record = (run.history() or [{}])[-1]
        final = {key: record[key] for key in keys} if keys[0] in record else on_test(trainer.task.student)
        best, chosen = final, "last epoch"
        if on_validation:
            trainer.task.student.load_state_dict(read_checkpoint(run.best)["model"])
            best, chosen = on_test(trainer.task.student), f"epoch {trainer.best['epoch']}, selected on held-out classes"
        elif session.config.select == "test":
            best = {key: trainer.best[key] for key in keys}
            chosen = f"epoch {trainer.best['epoch']}, selected on test"
        trainer.finish(final)
        suffix = ", beside a best that was selected on test" if session.config.select == "test" else ""
        lines = [f"Best Recall@{k}: {100 * best[f'recall@{k}']:.4f} ({chosen})" for k in session.config.recall]
        lines += [
            f"Final Recall@{k}: {100 * final[f'recall@{k}']:.4f} (last epoch{suffix})" for k in session.config.recall
        ]
        card = {
            "environment": trainer.environment,
            "seed": session.config.seed,
            "epochs": session.config.epochs,
            "data": {
                "name": session.config.dataset,
                "train": [len(session.train.records), session.train.records.num_classes],
                "test": [len(session.test.records), session.test.records.num_classes],
                "fingerprint": [session.train.records.fingerprint(), session.test.records.fingerprint()],
                "skipped": len(session.train.skipped) + len(session.test.skipped),
            },
            "parameters": sum(p.numel() for p in trainer.task.student.parameters()),
            "losses": session.config.loss,
            "selection": chosen,
            "metrics": {"best": best, "final": final},
        }
        write_text(run.result, "\n".join(lines) + "\n")
        write_text(run.card, json.dumps(card, indent=2) + "\n")
        say("\n".join(lines))
        say(f"wrote {run.best}")
        metrics = best
    return distributed.from_main(metrics)


def say(text: str) -> None:
    """One process speaks, without tearing progress bars."""
    if distributed.is_main():
        tqdm.write(text)
