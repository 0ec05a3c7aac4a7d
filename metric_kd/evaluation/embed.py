"""embed: every image of a loader through one network, as vectors in memory."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.distributed import copy_from_main, gather_objects, gather_rows, is_main
from metric_kd.errors import UserError
from metric_kd.modes import eval_mode
from metric_kd.types import Batch


class Embeddings(NamedTuple):
    """vectors: (N, D) float32; labels, indices: (N,) int64, ``indices`` being rows of the data set. All on the CPU."""

    vectors: Tensor
    labels: Tensor
    indices: Tensor


def embed(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: str | None = None,
    total: int | None = None,
    shared: bool = False,
) -> Embeddings:
    """The embeddings of all batches, in their order; the network is where ``device`` says and in eval mode meanwhile.

    Every module gets back the mode that it had, frozen batch normalisation included. precision: "fp32", "bf16" or
    "fp16" (autocast); the vectors are float32 in any case. progress: the title of a bar on stderr over ``total``
    batches. Raises ``UserError`` for an unknown precision and where there are no batches.

    shared: ``batches`` are this process's part of those of all processes, which call this together; the main one gets the
    embeddings of all, part by part, of its own network's statistics, and the others get none.
    """
    device = torch.device(device)
    vectors, labels, indices = [], [], []
    if shared:
        copy_from_main(network.buffers())
    with eval_mode(network), torch.inference_mode(), autocast(device, precision):
        for batch in with_bar(batches, progress, total):
            output = network(batch.images.to(device, non_blocking=True), want=("embedding",))
            vectors.append(output.embedding.float().cpu())
            labels.append(batch.labels.cpu())
            indices.append(batch.indices.cpu())
    if not any(gather_objects(bool(vectors)) if shared else [bool(vectors)]):
        raise UserError("there are no images to embed; check that the data set is not empty.")
    # Joined outside inference mode: the results are ordinary tensors, which a loss may read later.
    parts = [torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for parts in (vectors, labels, indices)]
    if shared:
        whole = [gather_rows(part, device) for part in parts]
        parts = [part[:0] if all_rows is None else all_rows for part, all_rows in zip(parts, whole, strict=True)]
    return Embeddings(*parts)


def with_bar(batches: Iterable[Batch], progress: str | None, total: int | None) -> Iterable[Batch]:
    if progress is None or not is_main():
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=progress, total=total, unit="batch", leave=False, mininterval=0.5)
