"""What a step costs in memory, and which batch would fit where one did not."""

import resource
import sys

import torch

from metric_kd.engine.tasks import Embedding
from metric_kd.types import Batch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory was exhausted, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text or "DefaultCPUAllocator" in text


def batch_that_fits(task: Embedding, batch: Batch, optimizer: torch.optim.Optimizer) -> str:
    """Measure by halving which part of the batch fits, and say so in one sentence."""
    size = len(batch.labels)
    tried = size
    while tried > 2:
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
    return f"even 2 of the batch's {size} images are out of memory; use a smaller --base or --input_size."


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
