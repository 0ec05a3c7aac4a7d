"""Whether an exported file does what the network does, how fast, and how well it retrieves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import resize
from metric_kd.deploy.embedder import Embedder, pixels_of
from metric_kd.deploy.export import EmbeddingGraph
from metric_kd.deploy.exported import Exported
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.retrieval import evaluate_retrieval

TOLERANCE = 1e-4
"""Largest difference of any number of an embedding in fp32, PyTorch's against the file's."""
BATCHES = (1, 64)
REPEATS, SECONDS = 10, 2.0
"""A time is the median of so many calls, or of two and more that take so long together."""


@dataclass(frozen=True)
class Parity:
    """difference: the largest between graph and file on equal tensors, absolute for embeddings of length 1 and otherwise
    over the largest value (where that is above 1); cosine: the smallest between the file and the Embedder, whose resizing
    is another kernel's; images: how many."""

    difference: float
    cosine: float
    images: int


def check_parity(graph: EmbeddingGraph, exported: Exported, images: Sequence[Any]) -> Parity:
    """Run images (as of :meth:`Embedder.embed`) one by one, and again as batches of one size, through PyTorch, the file and
    the Embedder; in full precision on CUDA too.
    """
    embedder = Embedder(graph.network, next(graph.parameters()).device, bridge=graph.bridge)
    ours, theirs, usual, resized = [], [], [], []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for image in images:
            pixels = pixels_of(image)
            ours.append(run_graph(graph, pixels[None]))
            theirs.append(exported.run(pixels[None]))
            usual.append(embedder.embed([pixels]))
            resized.append(resize(pixels[None], graph.side))
        cosine = float(_cosines(np.concatenate(theirs), np.concatenate(usual)).min())
        for start in range(0, len(resized), max(BATCHES)):
            batch = torch.cat(resized[start : start + max(BATCHES)])
            ours.append(run_graph(graph, batch))
            theirs.append(exported.run(batch))
    wanted, found = np.concatenate(ours), np.concatenate(theirs)
    return Parity(float(np.abs(wanted - found).max() / max(1.0, np.abs(wanted).max())), cosine, len(images))


def run_graph(graph: EmbeddingGraph, images: Tensor) -> np.ndarray:
    """(N, D) float32 of (N, 3, H, W) uint8, by PyTorch."""
    device = next(graph.parameters()).device
    with torch.inference_mode():
        return graph(images.to(device)).cpu().numpy()


def _cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / np.maximum(lengths, 1e-12)


def milliseconds(run: Callable[[Tensor], Any], images: Tensor) -> list[float]:
    """Per image, at each of ``BATCHES``; images: (N, 3, H, W) uint8, repeated where there are fewer."""
    found = []
    for size in BATCHES:
        batch = images[torch.arange(size) % len(images)].contiguous()
        run(batch)  # the first call allocates
        times: list[float] = []
        while len(times) < 2 or (len(times) < REPEATS and sum(times) < SECONDS):
            started = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - started)
        found.append(1000 * float(np.median(times)) / size)
    return found


def squares(images: Sequence[Any], side: int) -> Tensor:
    """(N, 3, side, side) uint8 of images of any size: what a network sees is the same whether they are resized before."""
    return torch.cat([resize(pixels_of(image)[None], side) for image in images])


def recall_at_1(exported: Exported, records: ImageRecords, progress: bool = False) -> float:
    """Recall@1 (fraction) of image files, or pixels in memory, through the file and the search of evaluation."""
    images: Any = list(records.paths) if records.paths is not None else records.pixels
    vectors = torch.from_numpy(exported.embed(images, progress=progress))
    found = Embeddings(vectors, torch.from_numpy(records.labels), torch.arange(len(records)))
    return retrieval_recall(found, records)


def retrieval_recall(found: Embeddings, records: ImageRecords) -> float:
    """Recall@1 (fraction) of embeddings of the records."""
    return evaluate_retrieval(found, [1], query=records.query, gallery=records.gallery)[0]["recall@1"]
