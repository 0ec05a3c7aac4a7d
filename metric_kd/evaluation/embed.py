"""embed: every image of a loader through one network, as vectors in memory."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
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
) -> Embeddings:
    """The embeddings of all batches, in their order; the network is where ``device`` says and in eval mode meanwhile.

    Every module gets back the mode that it had, frozen batch normalisation included. precision: "fp32", "bf16" or
    "fp16" (autocast); the vectors are float32 in any case. progress: the title of a bar on stderr over ``total``
    batches. Raises ``UserError`` for an unknown precision and where there are no batches.
    """
    device = torch.device(device)
    vectors, labels, indices = [], [], []
    with eval_mode(network), torch.inference_mode(), autocast(device, precision):
        for batch in with_bar(batches, progress, total):
            output = network(batch.images.to(device, non_blocking=True), want=("embedding",))
            vectors.append(output.embedding.float().cpu())
            labels.append(batch.labels.cpu())
            indices.append(batch.indices.cpu())
    if not vectors:
        raise UserError("there are no images to embed; check that the data set is not empty.")
    # Joined outside inference mode: the results are ordinary tensors, which a loss may read later.
    return Embeddings(torch.cat(vectors), torch.cat(labels), torch.cat(indices))


def with_bar(batches: Iterable[Batch], progress: str | None, total: int | None) -> Iterable[Batch]:
    if progress is None:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=progress, total=total, unit="batch", leave=False, mininterval=0.5)
