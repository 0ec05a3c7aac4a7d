"""What a step costs in memory, and which batch would fit where one did not."""

import resource
import sys
from pathlib import Path

import torch

from metric_kd.distributed import world_size
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.tasks import Task
from metric_kd.types import Batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was exhausted, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "DefaultCPUAllocator" in text


def way_out(task: Task, batch: Batch, optimizer: torch.optim.Optimizer, settings: Settings) -> str:
    """What to do where a step over this batch, or over several like it, was out of memory, in one sentence."""
    if world_size() > 1:  # the others would wait for every attempt
        return out_of_memory(len(batch.labels), world_size())
    if settings.chunk:
        return chunk_that_fits(task, batch, settings.chunk, optimizer)
    return batch_that_fits(task, batch, optimizer, settings.accumulate)


def batch_that_fits(task: Task, batch: Batch, optimizer: torch.optim.Optimizer, accumulate: int = 1) -> str:
    """Measure by halving which part of the batch fits, and say so in one sentence; ``accumulate``: batches in a step."""
    size = len(batch.labels)
    per_class = int((batch.labels == batch.labels[0]).sum())
    tried = size
    while tried // 2 > per_class:  # a batch holds two classes or more
        tried //= 2
        if fits(task, batch, tried, optimizer):
            return (
                f"a batch of {size} is out of memory and one of {tried} fits; run with --batch {tried}, and with --accumulate "
                f"{-(-size * accumulate // tried)} if a step shall see as many images."
            )
    return (
        f"a batch of {size} is out of memory and so is one of {tried}; use a smaller --base, --input_size or --batch."
    )


def chunk_that_fits(task: Task, batch: Batch, chunk: int, optimizer: torch.optim.Optimizer) -> str:
    """The same where the networks took ``chunk`` images of the batch at a time: whether that was too much, or the rest."""
    if not fits(task, batch, chunk, optimizer):
        return batch_that_fits(task, Batch(*(None if t is None else t[:chunk] for t in batch)), optimizer)  # type: ignore[arg-type]
    return (
        f"a step over {len(batch.labels)} images is out of memory, though the networks take {chunk} at a time: what they give "
        "of all of them is too large; lower --relation_batch."
    )


def fits(task: Task, batch: Batch, count: int, optimizer: torch.optim.Optimizer) -> bool:
    """Whether there is memory for the gradient of the first ``count`` images of a batch."""
    optimizer.zero_grad(set_to_none=True)
    if batch.images.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        total, _ = task(Batch(*(None if t is None else t[:count] for t in batch)))  # type: ignore[arg-type]
        total.backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def out_of_memory(share: int, processes: int) -> str:
    """The same of one process among several, which cannot try alone; ``share``: its part of the batch."""
    return (
        f"a batch of {share * processes}, {share} on each of {processes} processes, is out of memory; use more processes or a "
        "smaller --base, --input_size or --batch, of which --accumulate takes several for a step."
    )


_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Largest resident size of this process in bytes: since :func:`reset_peak_memory` where that works, else ever."""
    if _STATUS.exists():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> int | None:
    """Forget the peak so far and give the present size in bytes; None where the system cannot (it is not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
