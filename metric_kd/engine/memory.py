"""What a step costs in memory, and which batch would fit where one did not."""

import resource
import sys
from pathlib import Path

import torch

from metric_kd.distributed import world_size
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.replay import tensors
from metric_kd.engine.tasks import Solo, Task
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
        return out_of_memory(len(batch.labels), world_size(), settings.chunk)
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
    if fits(task, batch, chunk, optimizer, networks=True):
        return (
            f"a step over {len(batch.labels)} images is out of memory, though the networks take {chunk} at a time: what they "
            "give of all of them is too large; lower --relation_batch."
        )
    smaller = [count for count in range(chunk // 2, 1, -1) if chunk % count == 0]  # which divide --relation_batch too
    for tried in smaller:  # down to 2: batch normalisation cannot train on one
        if fits(task, batch, tried, optimizer, networks=True):
            return (
                f"the networks are out of memory over {chunk} images and not over {tried}; run with --batch {tried} and the "
                "same --relation_batch."
            )
    least = f" and over {smaller[-1]}" if smaller else ""
    return f"the networks are out of memory over {chunk} images{least}; use a smaller --base, --input_size or --batch."


def fits(task: Task, batch: Batch, count: int, optimizer: torch.optim.Optimizer, networks: bool = False) -> bool:
    """Whether there is memory for the gradient of the first ``count`` images of a batch; networks: of what the networks give
    of them, without the losses."""
    optimizer.zero_grad(set_to_none=True)
    if batch.images.device.type == "cuda":
        torch.cuda.empty_cache()
    part = Batch(*(None if t is None else t[:count] for t in batch))  # type: ignore[arg-type]
    try:
        if networks:
            _through_networks(task, part)
        else:
            task(part)[0].backward()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _through_networks(task: Task, part: Batch) -> None:
    """What :class:`~metric_kd.engine.replay.Replay` does with a chunk; any loss has a gradient in all that is given."""
    assert isinstance(task, Solo)
    task.teacher_output(part)
    given = [t for t in tensors(task.student_output(part)) if t.requires_grad]
    if given:
        torch.autograd.backward(given, [torch.ones_like(t) for t in given])


def out_of_memory(share: int, processes: int, chunk: int = 0) -> str:
    """The same of one process among several, which cannot try alone; ``share``: its part of the batch; chunk: as in
    ``Settings``, 0 where the networks take all of it at once."""
    if chunk:
        return (
            f"a step over {share * processes} images, of which each of {processes} processes takes {chunk} at a time, is out of "
            "memory; use more processes or a smaller --base, --input_size, --batch or --relation_batch."
        )
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
