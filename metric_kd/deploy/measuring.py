"""What an index loses against exact search, and what it costs."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from metric_kd.deploy.vector_index import Flat, VectorIndex
from metric_kd.evaluation.search import find_neighbours

QUERIES, TIMED, FOUND = 1000, 100, 10
TIE = 1e-5
"""Relative difference of distances up to which either of two neighbours counts as the nearer: rounding, and duplicates."""


@dataclass(frozen=True)
class Measured:
    """recall1, recall10: share of the true nearest 1 and 10 that are found, None where only codes are left or a vector is
    alone; queries: over how many; ms: per query, one at a time; bytes_each: :func:`bytes_per_vector`, paths not counted."""

    recall1: float | None
    recall10: float | None
    queries: int
    ms: float
    bytes_each: float

    def sentence(self, name: str) -> str:
        cost = f"{self.ms:.2f} ms per query, {self.bytes_each:,.0f} MB per million vectors"
        if self.queries == 1:
            return f"{name}: {cost}; it holds one image, which has no neighbour to find"
        if self.recall1 is None or self.recall10 is None:
            return f"{name}: {cost}; what it loses cannot be measured, as it holds codes only (see --keep_vectors)"
        finds = (
            f"finds {100 * self.recall1:.1f}% of the true nearest and {100 * self.recall10:.1f}% of the true nearest 10"
        )
        return f"{name}: {finds} ({self.queries:,} of its own vectors asked), {cost}"


def measure(index: VectorIndex, effort: int | None = None, vectors: np.ndarray | None = None) -> Measured:
    """Recall against exact search with up to 1,000 of the index's own vectors as queries, themselves left out.

    recall1: share of queries whose first neighbour is as near as the true one; recall10: mean share of the 10 found that are
    no further than the true tenth (all others, where there are fewer than 11 vectors). vectors: (N, D), where the caller has
    them; else those that the index holds.
    """
    vectors = index.vectors() if vectors is None else vectors
    count = len(index)
    chosen = np.sort(np.random.default_rng(0).choice(count, min(QUERIES, count), replace=False))
    asked = _examples(index, chosen) if vectors is None else np.ascontiguousarray(vectors[chosen])
    recalls: tuple[float | None, float | None] = (None, None)
    if vectors is not None and count > 1:
        exact = isinstance(index, Flat)
        recalls = (1.0, 1.0) if exact else _recalls(index, effort, vectors, chosen, asked)
    return Measured(*recalls, len(chosen), _milliseconds(index, effort, asked[:TIMED]), bytes_per_vector(index))


def _examples(index: VectorIndex, chosen: np.ndarray) -> np.ndarray:
    """Something to ask where no vector is left: as long as theirs, so that the time is right."""
    return np.random.default_rng(0).standard_normal((len(chosen), index.dimensions)).astype(np.float32)


def _recalls(
    index: VectorIndex, effort: int | None, vectors: np.ndarray, chosen: np.ndarray, asked: np.ndarray
) -> tuple[float, float]:
    k = min(FOUND, len(vectors) - 1)
    rows = torch.from_numpy(chosen)
    truth = find_neighbours(
        torch.from_numpy(asked),
        torch.from_numpy(vectors),
        k,
        query_labels=rows,
        gallery_labels=torch.zeros(len(vectors)),
        query_ids=rows,
        gallery_ids=torch.arange(len(vectors)),
    ).distances.numpy()
    first, all_of_them = 0.0, 0.0
    for start in range(0, len(chosen), 100):
        part = slice(start, start + 100)
        found = index.search(asked[part], k + 1, effort)[0]
        for query, own, near, true in zip(asked[part], chosen[part], found, truth[part], strict=True):
            near = near[(near != own) & (near >= 0)][:k]
            far = np.linalg.norm(vectors[near] - query, axis=1) if len(near) else np.array([np.inf])
            first += bool(far[0] <= true[0] * (1 + TIE) + 1e-12)
            all_of_them += (far <= true[-1] * (1 + TIE) + 1e-12).sum() / k
    return first / len(chosen), float(all_of_them) / len(chosen)


def _milliseconds(index: VectorIndex, effort: int | None, asked: np.ndarray) -> float:
    k = min(FOUND, len(index))
    index.search(asked[:1], k, effort)
    started = time.perf_counter()
    for n in range(len(asked)):
        index.search(asked[n : n + 1], k, effort)
    return 1e3 * (time.perf_counter() - started) / len(asked)


def bytes_per_vector(index: VectorIndex) -> float:
    """What one more vector takes: itself or its code, its id, its links, and what is kept beside the code."""
    factory, kept = index.factory, getattr(index, "kept", None)
    full = 4 * index.dimensions
    if (
        factory.kind == "HNSW"
    ):  # twice the links on the lowest level; a share of 1/links of the vectors is on each next one
        return full + 4 * (2 * factory.links + factory.links / (factory.links - 1)) + 12
    if factory.kind == "Flat":
        return full
    return (factory.pieces or full) + 8 + (0 if kept is None else kept.dtype.itemsize * index.dimensions)
