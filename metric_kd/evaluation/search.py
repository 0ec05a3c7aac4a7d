"""find_neighbours: exact nearest neighbours in blocks: products by torch, distances by faiss where it is installed."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metric_kd.errors import UserError, one_of
from metric_kd.evaluation.tiles import first_search, queries_at_once
from metric_kd.types import Neighbours

Distances = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, D) queries, (G, D) gallery and (B, M) rows of it to (B, M) distances, from the differences themselves."""

SPARE = 4
"""Candidates beyond what is asked for: rounding of the first search may swap neighbours at the edge."""
LARGEST = 1e15
"""Above this the squares of a few thousand numbers leave float32."""
RESCORE_TILE = 1 << 17
"""Elements of gathered candidates that torch compares at once (512 KiB, so that they stay in the cache)."""


@functools.lru_cache(maxsize=1)
def _faiss() -> Any:
    """The faiss module, or None. On macOS it is not used: faiss and torch bring an OpenMP each, and crash together."""
    if sys.platform == "darwin":
        return None
    try:
        import faiss  # after torch, whose import this file begins with: the other order has crashed
    except ImportError:
        return None
    return faiss


def load_faiss() -> Any:
    """The faiss module, which then uses as many threads as torch. Raises ``UserError`` where it cannot be used."""
    faiss = _faiss()
    if faiss is None:
        raise UserError("faiss cannot be imported here; pip install faiss-cpu, or search with torch.")
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def backend() -> str:
    """Which of "faiss" and "torch" a search uses."""
    return "torch" if _faiss() is None else "faiss"


def check_ks(ks: Iterable[int], gallery_size: int) -> None:
    """Raise ``UserError`` where a K of Recall@K cannot be; cheap, to be called before long work.

    gallery_size: the images that one query can retrieve; a query that is in the gallery does not count itself.
    """
    ks = list(ks)
    if not ks:
        raise UserError("Recall@K needs at least one K, as in 1 2 4 8.")
    for k in ks:
        if k != int(k) or k < 1:
            raise UserError(f"K = {k} is not possible in Recall@K; give whole numbers of 1 or more.")
        if k > gallery_size:
            raise UserError(
                f"K = {k} is larger than the gallery, where a query finds {gallery_size} images besides itself; "
                "choose a smaller K."
            )


def find_neighbours(
    query: Tensor,
    gallery: Tensor | None = None,
    k: int = 1,
    *,
    query_labels: Tensor,
    gallery_labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
    block: int = 2048,
    prefer: str | None = None,
) -> Neighbours:
    """The k gallery items of the smallest Euclidean distance to every query, exact, nearest first.

    query: (Q, D); gallery: (G, D), or None where the queries are the gallery too. ids: (Q,) and (G,) integers; an item
    with the id of the query is the query itself and is left out, wherever duplicates put it. Without a gallery the ids
    are the rows; with a gallery and no ids nothing is left out. prefer: "faiss" or "torch" instead of ``backend()``.

    Equal distances go to the lower row of the gallery (among more than k + 1 + ``SPARE`` equal ones, up to the rounding of
    the first search). Memory beyond the embeddings and the result is a few tiles (:mod:`metric_kd.evaluation.tiles`):
    there is no Q x G matrix and no copy of the embeddings. The first search works on |g|^2 - 2 q.g, which cancels for
    vectors far from the origin: therefore both sides are moved by the gallery's mean, tile by tile, and the candidates'
    distances are taken again from the differences of the given vectors, in float32: by faiss in place, by torch from
    gathered copies, which takes longer and may differ in the last digit.

    Raises ``UserError`` where an embedding is not finite (or above ``LARGEST``), or k is larger than the gallery (the
    query not counted).
    """
    query, query_labels = as_vectors(query, "query"), as_integers(query_labels)
    if gallery is None:
        query_ids = torch.arange(len(query)) if query_ids is None else as_integers(query_ids)
        gallery, gallery_labels, gallery_ids = query, query_labels, query_ids
    else:
        gallery = as_vectors(gallery, "gallery")
        if gallery_labels is None or (query_ids is None) != (gallery_ids is None):
            raise ValueError("a gallery comes with gallery_labels, and ids are given for both sides or none.")
        gallery_labels = as_integers(gallery_labels)
        query_ids = torch.full((len(query),), -1) if query_ids is None else as_integers(query_ids)
        gallery_ids = torch.full((len(gallery),), -2) if gallery_ids is None else as_integers(gallery_ids)
    check_shapes(query, gallery, (query_labels, query_ids), (gallery_labels, gallery_ids))
    shared = torch.isin(query_ids, gallery_ids).any().item()
    if shared and len(gallery_ids.unique()) < len(gallery_ids):
        raise UserError("two images of the gallery have the same id; give every image an id of its own.")
    check_ks([k], len(gallery) - int(shared))

    distances_of = _distances_by(prefer or backend())
    count = min(len(gallery), k + int(shared) + SPARE)
    block = queries_at_once(block, len(query), count)
    search = first_search(gallery, count, block)
    rows, distances = torch.empty(len(query), k, dtype=torch.int64), torch.empty(len(query), k)
    for start in range(0, len(query), block):
        part = slice(start, start + block)
        near = search(query[part])  # by row, so that the stable sort below settles ties by row
        far = distances_of(query[part], gallery, near)
        far.masked_fill_(gallery_ids[near] == query_ids[part, None], torch.inf)
        far, order = far.sort(dim=1, stable=True)
        rows[part], distances[part] = near.gather(1, order[:, :k]), far[:, :k]
    return Neighbours(rows, distances, query_labels, gallery_labels)


def as_vectors(x: Tensor, side: str) -> Tensor:
    x = torch.as_tensor(x).detach().to("cpu", torch.float32).contiguous()
    if x.dim() != 2 or len(x) == 0:
        raise UserError(f"the {side} embeddings have shape {tuple(x.shape)}; give (N, D) with N of 1 or more.")
    low, high = x.aminmax()
    if not (low > -LARGEST and high < LARGEST):  # also where either is NaN
        bad = len(x) - int((x.abs() < LARGEST).all(1).sum())
        raise UserError(
            f"{bad} of {len(x)} {side} embeddings are not finite (or above {LARGEST:.0e}); lower the learning rate, "
            "or use fp32 instead of fp16."
        )
    return x


def as_integers(x: Tensor) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.int64)


def check_shapes(query: Tensor, gallery: Tensor, of_query: tuple[Tensor, ...], of_gallery: tuple[Tensor, ...]) -> None:
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"the query embeddings have {query.shape[1]} dimensions, the gallery's {gallery.shape[1]}; "
            "embed both with one network."
        )
    for vectors, columns in ((query, of_query), (gallery, of_gallery)):
        if any(column.shape != (len(vectors),) for column in columns):
            raise ValueError("labels and ids have one entry per embedding.")


def _distances_by(name: str) -> Distances:
    ways = {"faiss": _faiss_distances, "torch": _torch_distances}
    if name not in ways:
        raise one_of("search back end", name, list(ways))
    if name == "faiss":
        load_faiss()
    return ways[name]


def _faiss_distances(query: Tensor, gallery: Tensor, rows: Tensor) -> Tensor:
    faiss = load_faiss()
    far = torch.empty(rows.shape)
    arrays = [x.contiguous().numpy() for x in (far, query, gallery, rows)]
    faiss.fvec_L2sqr_by_idx(*map(faiss.swig_ptr, arrays), query.shape[1], *rows.shape)
    return far.sqrt_()


def _torch_distances(query: Tensor, gallery: Tensor, rows: Tensor) -> Tensor:
    far = torch.empty(rows.shape)
    step = max(1, RESCORE_TILE // (rows.shape[1] * gallery.shape[1]))
    gathered = torch.empty(step * rows.shape[1], gallery.shape[1])
    for q, near, out in zip(query.split(step), rows.split(step), far.split(step), strict=True):
        there = torch.index_select(gallery, 0, near.flatten(), out=gathered[: near.numel()])
        gaps = there.view(*near.shape, -1).sub_(q[:, None])
        torch.linalg.vector_norm(gaps, dim=2, out=out)
    return far
