"""VectorIndex: vectors in a structure that is searched: exactly by torch (Flat), or approximately by faiss."""

import functools
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metric_kd.deploy.factory import Factory
from metric_kd.errors import UserError
from metric_kd.evaluation.search import find_neighbours, load_faiss

DIRECT = 64
"""Fewer queries than this are compared with every vector by differences; more share matrix products."""
SLICE = 1 << 22
"""Numbers of a gallery that are compared, added or converted at once (16 MiB)."""
GROUP = 32
"""Rows side by side of which only the nearest bounds what the k nearest can be."""
MANY = 8
"""More than one in so many rows in question: then all of them are compared, without a copy."""
PER_LIST = 64
"""Vectors per list that the lists are trained on; faiss asks for 39 or more."""
LEAST_SAMPLE = 1 << 15
RERANKED = 4
"""Times k: candidates whose exact distances are taken where vectors are kept beside their codes."""


class VectorIndex(ABC):
    """Rows 0 .. N-1 of vectors of one length, found by Euclidean distance. Reading is safe from several threads."""

    factory: Factory
    trained: int

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def dimensions(self) -> int: ...

    @abstractmethod
    def search(self, queries: np.ndarray, k: int, effort: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) float32 to rows (Q, k) int64 and distances (Q, k) float32, nearest first; -1 and inf where fewer are found.

        effort: lists to look into (IVF) or candidates to follow (HNSW); None: ``factory.effort``.
        """

    @abstractmethod
    def vectors(self) -> np.ndarray | None:
        """(N, D) float32 by row, as precise as they are held; None where only codes are left of them."""

    @abstractmethod
    def updated(self, keep: np.ndarray, new: np.ndarray) -> "VectorIndex":
        """The rows of the (N,) mask ``keep`` in their order, then the (M, D) ``new`` ones. Of the two only the result may
        be used afterwards."""


class Flat(VectorIndex):
    """All vectors, compared one by one; needs no faiss."""

    factory = Factory("Flat")

    def __init__(self, vectors: np.ndarray):
        self._vectors, self.trained = vectors, 0

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def dimensions(self) -> int:
        return int(self._vectors.shape[1])

    def search(self, queries: np.ndarray, k: int, effort: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        asked, gallery = torch.from_numpy(queries), torch.from_numpy(self._vectors)
        if len(queries) >= DIRECT:
            none, all_of_them = torch.zeros(len(asked)), torch.zeros(len(gallery))
            found = find_neighbours(asked, gallery, k, query_labels=none, gallery_labels=all_of_them)
            return found.indices.numpy(), found.distances.numpy()
        rows, distances = np.empty((len(asked), k), np.int64), np.empty((len(asked), k), np.float32)
        for n, query in enumerate(asked):
            near, far = _nearest(query, gallery, self._squares, k)
            rows[n], distances[n] = near.numpy(), far.numpy()
        return rows, distances

    @functools.cached_property
    def _squares(self) -> Tensor:
        """(N,) squared lengths."""
        return torch.linalg.vector_norm(torch.from_numpy(self._vectors), dim=1).square_()

    def vectors(self) -> np.ndarray:
        return self._vectors

    def updated(self, keep: np.ndarray, new: np.ndarray) -> "Flat":
        if not keep.any():
            return Flat(new)
        return Flat(np.concatenate([self._vectors if keep.all() else self._vectors[keep], new]))


def _nearest(query: Tensor, gallery: Tensor, squares: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows (k,) of the (N, D) gallery nearest to one query, and their distances; equal ones by row.

    By one product, |g|^2 - 2 q.g is known up to rounding: (D + 4) u (2 |q| |g| + |g|^2) at most, u = 2^-24, to either side. All
    rows that it leaves in question are compared by differences; where these are many (vectors far from the origin), all are.
    """
    offered = torch.addmv(squares, gallery, query, alpha=-2)
    whole = offered[: len(offered) // GROUP * GROUP].view(-1, GROUP)
    least = (
        whole.amin(1) if len(whole) >= k else offered
    )  # of k groups each has a row as near as the k-th least of these
    longest = squares.max().sqrt()
    rounding = 2 * (gallery.shape[1] + 4) * 2.0**-24 * longest * (2 * torch.linalg.vector_norm(query) + longest)
    near = torch.nonzero(offered <= least.kthvalue(k).values + rounding)[:, 0]
    if len(near) * MANY > len(gallery) > MANY * k:
        near = torch.arange(len(gallery))
        parts = gallery.split(max(1, SLICE // gallery.shape[1]))
        far = torch.cat([torch.linalg.vector_norm(part - query, dim=1) for part in parts])
    else:
        far = torch.linalg.vector_norm(gallery[near] - query, dim=1)
    order = far.sort(stable=True).indices[:k]
    return near[order], far[order]


class Approximate(VectorIndex):
    """A structure of faiss. ids: (N,) int64 ascending, what faiss calls each row; trained: vectors there were when the lists
    were trained; kept: (N, D) float16 or float32, by which what codes find is ordered again."""

    def __init__(self, factory: Factory, index: Any, ids: np.ndarray, trained: int, kept: np.ndarray | None = None):
        self.factory, self.index, self.ids, self.trained, self.kept = factory, index, ids, trained, kept

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimensions(self) -> int:
        return int(self.index.d)

    def search(self, queries: np.ndarray, k: int, effort: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        faiss = load_faiss()
        effort = effort or self.factory.effort
        wanted = k if self.kept is None else min(len(self), RERANKED * k)
        if self.factory.kind == "HNSW":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, wanted))
        else:
            parameters = faiss.SearchParametersIVF(nprobe=min(effort, self.factory.lists))
        # faiss.contrib.torch_utils, which other libraries import, replaces search by one that takes no parameters, and keeps
        # the one of NumPy arrays under this name.
        search = getattr(self.index, "search_numpy", self.index.search)
        squares, ids = search(np.ascontiguousarray(queries), wanted, params=parameters)
        rows = np.where(ids < 0, -1, np.searchsorted(self.ids, ids))
        if self.kept is not None:
            return self._reranked(queries, rows, k)
        return rows, np.where(rows < 0, np.inf, np.sqrt(np.maximum(squares, 0))).astype(np.float32)

    def _reranked(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.kept is not None
        best, distances = np.empty((len(rows), k), np.int64), np.empty((len(rows), k), np.float32)
        for n, query in enumerate(queries):
            gaps = self.kept[rows[n]].astype(np.float32) - query
            far = np.where(rows[n] < 0, np.inf, np.sqrt(np.einsum("nd,nd->n", gaps, gaps)))
            order = np.argsort(far, kind="stable")[:k]
            best[n], distances[n] = rows[n][order], far[order]
        return best, distances

    def vectors(self) -> np.ndarray | None:
        if self.kept is not None:
            return self.kept.astype(np.float32, copy=False)
        if self.factory.kind == "HNSW":
            found = np.empty(
                (len(self), self.index.d), np.float32
            )  # given, or a faiss that knows tensors would return one
            return self.index.reconstruct_n(0, len(self), found)
        return None if self.factory.pieces else self._from_lists()

    def _from_lists(self) -> np.ndarray:
        """What lies in the lists, by row; a direct map of faiss would change the index, and stay."""
        faiss = load_faiss()
        found = np.empty((len(self), self.index.d), np.float32)
        lists = self.index.invlists
        for number in range(lists.nlist):
            size = lists.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
                found[np.searchsorted(self.ids, ids)] = codes.view(np.float32).reshape(size, -1)
        return found

    def updated(self, keep: np.ndarray, new: np.ndarray) -> VectorIndex:
        kept = None if self.kept is None else np.concatenate([self.kept[keep], new.astype(self.kept.dtype)])
        if self.factory.kind == "HNSW":
            if not keep.all():  # nothing can be taken out of the graph
                there = self.vectors()
                assert there is not None
                return build(self.factory, np.concatenate([there[keep], new]))
            ids = np.arange(len(self) + len(new))
        else:
            if not keep.all():
                self.index.remove_ids(self.ids[~keep])
            first = int(self.ids[-1]) + 1 if len(self.ids) else 0
            ids = np.concatenate([self.ids[keep], np.arange(first, first + len(new))])
        _fill(self.index, self.factory, new, ids[len(ids) - len(new) :])
        return Approximate(self.factory, self.index, ids, self.trained, kept)


def build(factory: Factory, vectors: np.ndarray, keep: str | None = None) -> VectorIndex:
    """An index of (N, D) float32 vectors, the same each time; ``vectors`` may be a memory map that is read in slices.

    Lists and codes are trained on a sample of ``PER_LIST`` vectors per list. A graph is built by one thread: with several
    it would be another one each time. keep: "float16" or "float32": the vectors beside their codes (PQ only).
    """
    if factory.kind == "Flat":
        return Flat(vectors)
    faiss = load_faiss()
    count, dimensions = vectors.shape
    if factory.kind == "HNSW":
        index = faiss.IndexHNSWFlat(dimensions, factory.links)
    else:
        quantizer = faiss.IndexFlatL2(dimensions)
        if factory.pieces:
            index = faiss.IndexIVFPQ(quantizer, dimensions, factory.lists, factory.pieces, 8)
            index.pq.cp.min_points_per_centroid = 1  # fewer are worse, not wrong; faiss would print a warning
        else:
            index = faiss.IndexIVFFlat(quantizer, dimensions, factory.lists)
        index.cp.min_points_per_centroid = 1
        size = min(count, max(LEAST_SAMPLE, PER_LIST * factory.lists))
        chosen = np.sort(np.random.default_rng(0).choice(count, size, replace=False))
        index.train(np.ascontiguousarray(vectors[chosen]))
    _fill(index, factory, vectors, np.arange(count))
    kept = vectors.astype(keep) if keep is not None and factory.pieces else None
    return Approximate(factory, index, np.arange(count), count, kept)


def _fill(index: Any, factory: Factory, vectors: np.ndarray, ids: np.ndarray) -> None:
    faiss = load_faiss()
    step = max(1, SLICE // index.d)
    threads = faiss.omp_get_max_threads()
    try:
        if factory.kind == "HNSW":
            faiss.omp_set_num_threads(1)
        for start in range(0, len(vectors), step):
            part = np.ascontiguousarray(vectors[start : start + step])
            if factory.kind == "HNSW":
                index.add(part)
            else:
                index.add_with_ids(part, ids[start : start + step])
    finally:
        faiss.omp_set_num_threads(threads)


def check_faiss(factory: Factory) -> None:
    """Raise ``UserError`` where a structure needs faiss and there is none."""
    if factory.kind != "Flat":
        try:
            load_faiss()
        except UserError as error:
            raise UserError(
                f"{factory} needs faiss, which cannot be imported here; pip install faiss-cpu, or use --factory Flat."
            ) from error
