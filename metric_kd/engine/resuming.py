"""last.pth: whether a run may go on from it, and whether what is to be saved may be."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd import distributed
from metric_kd.distill.granularity import Coders
from metric_kd.engine.logging import not_finite
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Task
from metric_kd.errors import UserError
from metric_kd.models.network import Network


def read_progress(
    run: RunDirectory, config: dict[str, Any], student: Network | Coders, steps: int, environment: dict[str, Any]
) -> dict[str, Any] | None:
    """What last.pth holds, where it belongs to this run; None where there is none. ``UserError`` where it cannot go on.

    config: of the run that is to go on; steps: of an epoch; environment: as of ``reproducibility.environment``, of now.
    On another number of processes it can: batches are drawn for all of them together. Only where their number in an epoch
    differs, because the images do not divide evenly, a run that stopped within an epoch is refused.
    """
    there = distributed.gather_objects(run.last.is_file())
    if any(there) and not all(there):
        raise UserError(f"only some processes see {run.last}; put --save_dir where all machines see the same files.")
    if not any(there):
        return None
    state = run.read_last(config)
    if state[student.role] != student.spec.to_dict():
        raise UserError(
            f"{run.path} holds other {student.role} than these, of another teacher or form; give another "
            "--save_dir, or --resume never to start over."
        )
    position = state["position"]
    if position["iteration"] and position.get("of", steps) != steps:
        raise UserError(
            f"{run.path} stopped within an epoch of {position['of']} steps and for this number of processes an epoch "
            f"has {steps}; start as many processes as before ({state['environment'].get('processes')})."
        )
    _warn(run, state["environment"], environment)
    return state


def _warn(run: RunDirectory, stored: dict[str, Any], environment: dict[str, Any]) -> None:
    """Say what is another now than it was, so that bits may differ."""
    for key, value in environment.items():
        if stored.get(key) != value and distributed.is_main():
            tqdm.write(
                f"warning: {run.last} was written with {key} {stored.get(key)}, this is {value}; "
                "the result will not equal that of an undisturbed run bit for bit."
            )


def check_finite(task: Task, step: int, last: Path) -> None:
    """Raise ``UserError`` for weights that are not finite, which are never saved: the checkpoint ``last`` stays."""
    state: dict[str, Tensor] = {name: p for name, p in task.named_parameters() if p.is_floating_point()}
    for name, network in task.networks.items():
        state |= {f"{name}.{key}": buffer for key, buffer in network.named_buffers() if buffer.is_floating_point()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in state.values()]).tolist()
    for name, good in zip(state, finite, strict=True):
        if not good:
            raise UserError(not_finite(f"weight {name!r}", step, last))
