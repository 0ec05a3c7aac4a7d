"""evaluate_retrieval: Recall@K of one network's embeddings, with query and gallery sets where a data set has them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.metrics import recall_at_k
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
) -> tuple[dict[str, float], Neighbours]:
    """({"recall@K": fraction}, the max(ks) nearest neighbours of every query).

    query, gallery: bool, one entry per row of the *data set* (looked up by ``embeddings.indices``, so the order of the
    embeddings does not matter), or None where every image is one. An image that is both never retrieves itself; a query
    whose class has no other image in the gallery is a miss. The neighbours' indices count the gallery's images, in the
    order of the embeddings. Raises ``UserError`` for an empty side, and as :func:`find_neighbours` does.
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
    return {f"recall@{k}": value for k, value in recall_at_k(neighbours, ks).items()}, neighbours


def _chosen(mask: np.ndarray | Tensor | None, side: str, rows: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(len(rows), dtype=torch.bool)
    mask = torch.as_tensor(mask).to("cpu", torch.bool)
    if len(rows) and int(rows.max()) >= len(mask):
        raise UserError(
            f"the {side} column has {len(mask)} entries but the images count up to row {int(rows.max())}; "
            "give one entry per image of the data set."
        )
    chosen = mask[rows]
    if not chosen.any():
        raise UserError(f"no image is marked as {side}; check the {side} column of the data set.")
    return chosen
