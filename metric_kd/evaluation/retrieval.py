"""evaluate_retrieval: Recall@K of one network's embeddings, with query and gallery sets and cameras where a data set has them."""

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.metrics import recall_at_k
from metric_kd.evaluation.reidentification import reidentify
from metric_kd.evaluation.search import check_ks, find_neighbours
from metric_kd.types import Neighbours

__all__ = ["check_ks", "evaluate_retrieval", "gallery_size"]


def gallery_size(count: int, query: np.ndarray | None = None, gallery: np.ndarray | None = None) -> int:
    """What ``check_ks`` wants: images that a query of a data set of ``count`` images can retrieve, itself left out.

    query, gallery: (count,) bool, or None where every image is one.
    """
    queries = np.ones(count, bool) if query is None else np.asarray(query, bool)
    candidates = np.ones(count, bool) if gallery is None else np.asarray(gallery, bool)
    return int(candidates.sum()) - int((candidates & queries).any())


def evaluate_retrieval(
    embeddings: Embeddings,
    ks: Iterable[int],
    *,
    query: np.ndarray | Tensor | None = None,
    gallery: np.ndarray | Tensor | None = None,
    cameras: np.ndarray | Tensor | None = None,
) -> tuple[dict[str, float], Neighbours]:
    """({"recall@K": fraction}, the max(ks) nearest neighbours of every query); with cameras rank1, rank5, rank10 and mAP too.

    query, gallery: bool, one entry per row of the *data set* (looked up by ``embeddings.indices``, so the order of the
    embeddings does not matter), or None where every image is one. An image that is both never retrieves itself; a query
    whose class has no other image in the gallery is a miss. The neighbours' indices count the gallery's images, in the
    order of the embeddings.

    cameras: integers, one entry per row of the data set, or None. Rank-k and mAP are those of :func:`reidentify`: an image
    of the query's class by the query's camera does not count, where Recall@K counts it as a hit. Queries that have no
    match are left out of them, with a warning that says how many. Raises ``UserError`` for an empty side, and as
    :func:`find_neighbours` and :func:`reidentify` do.
    """
    ks = list(ks)
    asked, offered = _chosen(query, "query", embeddings.indices), _chosen(gallery, "gallery", embeddings.indices)
    both = bool((asked & offered).any())
    check_ks(ks, int(offered.sum()) - int(both))
    whole = bool(asked.all()) and bool(offered.all())
    vectors, labels, ids = embeddings
    neighbours = find_neighbours(
        vectors if whole else vectors[asked],
        None if whole else vectors[offered],
        max(ks),
        query_labels=labels[asked],
        gallery_labels=None if whole else labels[offered],
        query_ids=ids[asked],
        gallery_ids=None if whole else ids[offered],
    )
    metrics = {f"recall@{k}": value for k, value in recall_at_k(neighbours, ks).items()}
    if cameras is not None:
        metrics |= _across_cameras(embeddings, asked, offered, _entries(cameras, "camera", ids))
    return metrics, neighbours


def _across_cameras(embeddings: Embeddings, asked: Tensor, offered: Tensor, cameras: Tensor) -> dict[str, float]:
    vectors, labels, _ = embeddings
    found = reidentify(
        vectors[asked],
        vectors[offered],
        query_labels=labels[asked],
        gallery_labels=labels[offered],
        query_cameras=cameras[asked],
        gallery_cameras=cameras[offered],
    )
    if found.left_out:
        warnings.warn(
            f"{found.left_out} of {len(found.first)} queries have no image of their class by another camera in the "
            "gallery; rank-k and mAP leave them out.",
            stacklevel=3,
        )
    return found.metrics


def _chosen(mask: np.ndarray | Tensor | None, side: str, rows: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(rows), dtype=torch.bool)
    chosen = _entries(mask, side, rows).bool()
    if not chosen.any():
        raise UserError(f"no image is marked as {side}; check the {side} column of the data set.")
    return chosen


def _entries(column: np.ndarray | Tensor, name: str, rows: Tensor) -> Tensor:
    """The entries of a column of the data set for the given rows of it."""
    column = torch.as_tensor(column).cpu()
    if len(rows) and int(rows.max()) >= len(column):
        raise UserError(
            f"the {name} column has {len(column)} entries but the images count up to row {int(rows.max())}; "
            "give one entry per image of the data set."
        )
    return column[rows]
