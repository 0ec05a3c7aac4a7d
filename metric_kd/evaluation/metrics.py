"""What is said about neighbours; every metric is one function of :class:`~metric_kd.types.Neighbours`."""

from collections.abc import Iterable

from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.search import check_ks, find_neighbours
from metric_kd.types import Neighbours


def recall_at_k(neighbours: Neighbours, ks: Iterable[int]) -> dict[int, float]:
    """Recall@K, the hit rate: {K: fraction of queries with at least one item of their class among the K nearest}.

        Recall@K = 1/Q sum_q [ some j <= K has label(neighbour_j(q)) = label(q) ]

    This is what the papers on metric learning report. It is not torchmetrics' ``RetrievalRecall``, the share of *all*
    items of the class that are among the K nearest. A query whose class has no other item in the gallery is a miss.
    Raises ``UserError`` where fewer than K neighbours were searched.
    """
    ks = list(ks)
    searched = neighbours.indices.shape[1]
    if ks and max(ks) > searched:
        raise UserError(f"Recall@{max(ks)} needs {max(ks)} neighbours and {searched} were searched; search for more.")
    check_ks(ks, searched)
    found = neighbours.indices >= 0
    right = neighbours.gallery_labels[neighbours.indices.clamp(min=0)] == neighbours.query_labels[:, None]
    hits = (right & found).cumsum(1)
    return {k: int((hits[:, k - 1] > 0).sum()) / len(hits) for k in ks}


def recall(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1,)) -> dict[int, float]:
    """Recall@K of (N, D) embeddings with (N,) labels, each a query against all others; see :func:`recall_at_k`."""
    ks = list(ks)
    check_ks(ks, len(embeddings) - 1)
    return recall_at_k(find_neighbours(embeddings, k=max(ks), query_labels=labels), ks)
