"""What a step costs in memory, and which batch would fit where one did not."""

import resource
import sys
from pathlib import Path

import torch

from metric_kd.engine.tasks import Task
from metric_kd.types import Batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was exhausted, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "DefaultCPUAllocator" in text


def batch_that_fits(task: Task, batch: Batch, optimizer: torch.optim.Optimizer) -> str:
    """Measure by halving which part of the batch fits, and say so in one sentence."""
    size = len(batch.labels)
    per_class = int((batch.labels == batch.labels[0]).sum())
    tried = size
    while tried // 2 > per_class:  # a batch holds two classes or more
        tried //= 2
        optimizer.zero_grad(set_to_none=True)
        if batch.images.device.type == "cuda":
            torch.cuda.empty_cache()
        part = Batch(*(None if t is None else t[:tried] for t in batch))  # type: ignore[arg-type]
        try:
            total, _ = task(part)
            total.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            continue
        return f"a batch of {size} is out of memory and one of {tried} fits; run with --batch {tried}."
    return (
        f"a batch of {size} is out of memory and so is one of {tried}; use a smaller --base, --input_size or --batch."
    )


def out_of_memory(share: int, processes: int) -> str:
    """The same of one process among several, which cannot try alone; ``share``: its part of the batch."""
    return (
        f"a batch of {share * processes}, {share} on each of {processes} processes, is out of memory; use more processes or a "
        "smaller --base, --input_size or --batch."
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
