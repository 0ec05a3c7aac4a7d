"""last.pth: everything that the rest of a run depends on, and how a trainer goes on from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd import distributed, kernels
from metric_kd.engine import reproducibility
from metric_kd.engine.logging import not_finite
from metric_kd.engine.tasks import Task
from metric_kd.errors import UserError

if TYPE_CHECKING:
    from metric_kd.engine.trainer import Trainer


def progress(trainer: "Trainer", seconds: float) -> dict[str, Any] | None:
    """What last.pth holds; ``seconds``: of the epoch, since the start or the last resume.

    All processes call it together; the main one gets the content, the others None.
    """
    losses, gradients = trainer.losses.state(), trainer.gradients.state()
    # One that failed on the way is not what computes.
    trainer.environment["kernels"] = kernels.described(trainer.device)
    states = distributed.gather_objects(reproducibility.random_states())
    if not distributed.is_main():
        return None
    return {
        **trainer.state_of(trainer.task.student),
        "task": {key: value for key, value in trainer.task.state_dict().items() if value is not None},
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "losses": losses,
        "gradients": gradients,
        "position": {
            "stage": trainer.stage,
            "stages": [entered[1].name for entered in trainer.stages if entered],
            "epoch": trainer.epoch,
            "iteration": trainer.iteration,
            "step": trainer.step,
            "lines": trainer.lines,
            "of": trainer.steps,
        },
        "seconds": trainer.seconds + seconds,
        "best": trainer.best,
        "random": states,
        "observers": {o.name: o.state() for o in trainer.observers if o.name},
        "environment": trainer.environment,
        "config": trainer.config,
    }


def read_progress(trainer: "Trainer") -> dict[str, Any] | None:
    """What last.pth holds, where it belongs to this run; None where there is none. ``UserError`` where it cannot go on.

    On another number of processes it can: batches are drawn for all of them together. Only where their number in an epoch
    differs, because the images do not divide evenly, a run that stopped within an epoch is refused.
    """
    run = trainer.run
    there = distributed.gather_objects(run.last.is_file())
    if any(there) and not all(there):
        raise UserError(f"only some processes see {run.last}; put --save_dir where all machines see the same files.")
    if not any(there):
        return None
    state = run.read_last(trainer.config)
    student = trainer.task.student
    if state[student.role] != student.spec.to_dict():
        raise UserError(
            f"{run.path} holds other {student.role} than these, of another teacher or form; give another "
            "--save_dir, or --resume never to start over."
        )
    position = state["position"]
    if position["iteration"] and position.get("of", trainer.steps) != trainer.steps:
        raise UserError(
            f"{run.path} stopped within an epoch of {position['of']} steps and for this number of processes an epoch "
            f"has {trainer.steps}; start as many processes as before ({state['environment'].get('processes')})."
        )
    _warn(trainer, state["environment"])
    return state


def _warn(trainer: "Trainer", stored: dict[str, Any]) -> None:
    """Say what is another now than it was, so that bits may differ."""
    for key, value in trainer.environment.items():
        if stored.get(key) != value and distributed.is_main():
            tqdm.write(
                f"warning: {trainer.run.last} was written with {key} {stored.get(key)}, this is {value}; "
                "the result will not equal that of an undisturbed run bit for bit."
            )


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Put a trainer where :func:`progress` found it."""
    position = state["position"]
    trainer.enter_stage(position["stage"])
    trainer.task.load_state_dict(state["task"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.losses.restore(state["losses"])
    if "gradients" in state:
        trainer.gradients.restore(state["gradients"])
    trainer.epoch, trainer.iteration, trainer.step = position["epoch"], position["iteration"], position["step"]
    trainer.lines = position["lines"]
    trainer.seconds, trainer.best = state["seconds"], state["best"]
    kept = state["observers"]
    for observer in trainer.observers if distributed.is_main() else ():
        if observer.name in kept:
            observer.restore(kept[observer.name])
    if len(state["random"]) == distributed.world_size():
        reproducibility.restore_random_states(state["random"][distributed.rank()])


def check_finite(task: Task, step: int, last: Path) -> None:
    """Raise ``UserError`` for weights that are not finite, which are never saved: the checkpoint ``last`` stays."""
    state: dict[str, Tensor] = {name: p for name, p in task.named_parameters() if p.is_floating_point()}
    for name, network in task.networks.items():
        state |= {f"{name}.{key}": buffer for key, buffer in network.named_buffers() if buffer.is_floating_point()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in state.values()]).tolist()
    for name, good in zip(state, finite, strict=True):
        if not good:
            raise UserError(not_finite(f"weight {name!r}", step, last))
