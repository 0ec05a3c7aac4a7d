"""The gradient of a step from one batch or several, one after the other."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metric_kd.distributed import copy_from_main, world_size
from metric_kd.types import Batch

Scale = Callable[[Tensor], Tensor]
"""What a loss passes through before its backward pass: that of a GradScaler."""


def groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one step after the other; the last step of an epoch may have fewer."""
    stream = iter(batches)
    while group := list(islice(stream, size)):
        yield group


def exchanging(task: nn.Module, device: torch.device, averages: bool) -> nn.Module:
    """The task as several processes train it together; with one process the task itself.

    All begin with what the main one has. averages: whether backward passes average the gradients over the processes.
    """
    if world_size() == 1:
        return task
    if not averages:
        copy_from_main([*task.parameters(), *task.buffers()])
        return task
    ids = [device.index] if device.type == "cuda" else None
    # Stages, and losses of weight 0, leave parts unused; that other runs use them all is no news to their users.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    module = DistributedDataParallel(task, device_ids=ids, find_unused_parameters=True)
    # Statistics need not be alike while they are only written: evaluation and checkpoints take the main process's.
    module.broadcast_buffers = False
    return module


def accumulate(
    module: nn.Module, batches: Sequence[Batch], device: torch.device, scale: Scale, reseed: Callable[[int], None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add to every parameter the gradient of sum_b (n_b / n) L_b, and return that sum and the values of its terms.

    L_b: ``module`` of batch b of n_b images, n their sum, so that terms which are means over images give what one batch of
    n would. Terms that relate images see one batch each. reseed(b): called before every batch but the first, whose
    random numbers are those of the step. Processes exchange gradients once, after the last batch.
    """
    images = sum(len(batch.labels) for batch in batches)
    totals: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        if number:
            reseed(number)
        share = len(batch.labels) / images
        waits = isinstance(module, DistributedDataParallel) and number + 1 < len(batches)
        with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
            total, values = module(batch.to(device))
            scale(total if share == 1 else total * share).backward()
        totals.append(total.detach() * share)
        sums = {name: value * share + sums.get(name, 0.0) for name, value in values.items()}
    return torch.stack(totals).sum(), sums
