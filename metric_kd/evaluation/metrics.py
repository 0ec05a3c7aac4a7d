"""What is said about neighbours; every metric is one function of :class:`~metric_kd.types.Neighbours`."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from metric_kd.errors import UserError, one_of
from metric_kd.evaluation.search import as_integers, check_ks, find_neighbours
from metric_kd.types import Neighbours

BLOCK = 1 << 19
"""Neighbours that are looked at together (a few MiB)."""


def recall_at_k(neighbours: Neighbours, ks: Iterable[int]) -> dict[int, float]:
    """Recall@K, the hit rate: {K: fraction of queries with at least one item of their class among the K nearest}.

        Recall@K = 1/Q sum_q [ some j <= K has label(neighbour_j(q)) = label(q) ]

    This is what the papers on metric learning report. It is not torchmetrics' ``RetrievalRecall``, the share of *all*
    items of the class that are among the K nearest. A query whose class has no other item in the gallery is a miss.
    Raises ``UserError`` where fewer than K neighbours were searched.
    """
    ks = list(ks)
    _check_searched(neighbours, max(ks, default=0), f"Recall@{max(ks, default=0)}")
    check_ks(ks, neighbours.indices.shape[1])
    hits = _matches(neighbours).cumsum(1)
    return {k: int((hits[:, k - 1] > 0).sum()) / len(hits) for k in ks}


def hits_at_k(neighbours: Neighbours, k: int = 1) -> Tensor:
    """(Q,) float64: 1 for a query with an item of its class among its K nearest, else 0; their mean is Recall@K.

    Raises ``UserError`` where fewer than K neighbours were searched.
    """
    _check_searched(neighbours, k, f"Recall@{k}")
    return _matches(neighbours)[:, :k].any(1).double()


def recall(embeddings: Tensor, labels: Tensor, ks: Iterable[int] = (1,)) -> dict[int, float]:
    """Recall@K of (N, D) embeddings with (N,) labels, each a query against all others; see :func:`recall_at_k`."""
    ks = list(ks)
    check_ks(ks, len(embeddings) - 1)
    return recall_at_k(find_neighbours(embeddings, k=max(ks), query_labels=labels), ks)


def relevant_counts(
    query_labels: Tensor,
    gallery_labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    gallery_ids: Tensor | None = None,
) -> Tensor:
    """(Q,) int64: R, how many images of its class a query can find; the query itself is not one of them.

    As in :func:`find_neighbours`: without a gallery the queries are the gallery; with a gallery and without ids nothing is
    left out, and with ids an image of the gallery that has the id of the query is the query.
    """
    query_labels = as_integers(query_labels)
    if gallery_labels is None:
        _, place, counts = query_labels.unique(return_inverse=True, return_counts=True)
        return counts[place] - 1
    classes, counts = as_integers(gallery_labels).unique(return_counts=True)
    place = torch.searchsorted(classes, query_labels).clamp(max=len(classes) - 1)
    found = torch.where(classes[place] == query_labels, counts[place], 0)
    if query_ids is None or gallery_ids is None:
        return found
    return found - torch.isin(as_integers(query_ids), as_integers(gallery_ids)).long()


def map_at_r(neighbours: Neighbours, relevant: Tensor) -> float:
    """MAP@R, the mean average precision at R: over the queries that have R >= 1 relevant images,

        AP@R = 1/R sum_{j <= R} [ neighbour j is of the query's class ] * (share of its class among the first j)

    relevant: (Q,), R of every query, as :func:`relevant_counts` gives it. Queries with R = 0 have no value and are left
    out, as in pytorch-metric-learning's ``AccuracyCalculator``. Raises ``UserError`` where fewer than max R neighbours were
    searched, or no query has a relevant image.

    Musgrave, Belongie, Lim: A Metric Learning Reality Check, ECCV 2020, arXiv 2003.08505, section 3.2 [M].
    """
    return mean_over_queries(average_precisions_at_r(neighbours, relevant))


def r_precision(neighbours: Neighbours, relevant: Tensor) -> float:
    """R-precision: the share of the query's class among its R nearest neighbours; the rest as :func:`map_at_r` has it."""
    return mean_over_queries(r_precisions(neighbours, relevant))


def precision_at_k(neighbours: Neighbours, relevant: Tensor, k: int) -> float:
    """Precision@K: the share of the query's class among its K nearest neighbours, mean over queries with R >= 1.

    At K = 1 this is Recall@1 but for the queries without any relevant image, which Recall@K counts as misses. A class with
    fewer than K other images cannot reach 1. Raises ``UserError`` as :func:`map_at_r` does.
    """
    return mean_over_queries(precisions_at_k(neighbours, relevant, k))


def average_precisions_at_r(neighbours: Neighbours, relevant: Tensor) -> Tensor:
    """(Q,) float64: AP@R of every query, NaN where R is 0."""
    _check_searched(neighbours, int(relevant.max()), "MAP@R")
    places = torch.arange(1, neighbours.indices.shape[1] + 1)

    def score(right: Tensor, r: Tensor) -> Tensor:
        right = right & (places <= r[:, None])
        share = right.cumsum(1, dtype=torch.int32) / places.double()
        return share.mul_(right).sum(1) / r

    return _by_query(neighbours, relevant, score)


def r_precisions(neighbours: Neighbours, relevant: Tensor) -> Tensor:
    """(Q,) float64: R-precision of every query, NaN where R is 0."""
    _check_searched(neighbours, int(relevant.max()), "R-precision")
    places = torch.arange(1, neighbours.indices.shape[1] + 1)
    return _by_query(neighbours, relevant, lambda right, r: (right & (places <= r[:, None])).sum(1) / r.double())


def precisions_at_k(neighbours: Neighbours, relevant: Tensor, k: int) -> Tensor:
    """(Q,) float64: Precision@K of every query, NaN where R is 0."""
    _check_searched(neighbours, k, f"precision@{k}")
    first = neighbours._replace(indices=neighbours.indices[:, :k])
    share = _by_query(first, relevant, lambda right, _: right.sum(1).double() / k)
    return share.masked_fill_(relevant == 0, torch.nan)


def mean_over_queries(values: Tensor) -> float:
    """The mean of those that are no NaN. Raises ``UserError`` where there are none."""
    values = values[~values.isnan()]
    if len(values) == 0:
        raise UserError("no query has another image of its class in the gallery; check the labels.")
    return float(values.mean())


def _by_query(neighbours: Neighbours, relevant: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score blocks of ((B, K) bool: is the neighbour of the query's class, (B,) R) one after the other."""
    rows = max(1, BLOCK // neighbours.indices.shape[1])
    indices, labels = neighbours.indices.split(rows), neighbours.query_labels.split(rows)
    blocks = zip(indices, labels, relevant.split(rows), strict=True)
    parts = (score(_matches(neighbours._replace(indices=near, query_labels=own)), r) for near, own, r in blocks)
    return torch.cat(list(parts))


def _matches(neighbours: Neighbours) -> Tensor:
    found = neighbours.indices >= 0
    right = neighbours.gallery_labels[neighbours.indices.clamp(min=0)] == neighbours.query_labels[:, None]
    return right & found


def _check_searched(neighbours: Neighbours, wanted: int, name: str) -> None:
    searched = neighbours.indices.shape[1]
    if wanted > searched:
        raise UserError(f"{name} needs {wanted} neighbours and {searched} were searched; search for more.")


class NeighbourMetric(NamedTuple):
    """A metric that is a mean over queries.

    title: for people; wanted: how many neighbours it reads, from (Q,) R; values: (neighbours, R) to (Q,), NaN where R is 0.
    """

    title: str
    wanted: Callable[[Tensor], int]
    values: Callable[[Neighbours, Tensor], Tensor]


NEIGHBOUR_METRICS = {
    "map@r": NeighbourMetric("MAP@R", lambda relevant: int(relevant.max()), average_precisions_at_r),
    "r_precision": NeighbourMetric("R-precision", lambda relevant: int(relevant.max()), r_precisions),
}
NMI = "nmi"
PRECISION = "precision@"


def neighbour_metric(name: str) -> NeighbourMetric:
    """The metric of a name: "map@r", "r_precision", or "precision@K" with a whole number K. Raises ``UserError`` for others."""
    digits = name.removeprefix(PRECISION)
    if digits != name and digits.isascii() and digits.isdecimal() and int(digits) > 0:
        k = int(digits)
        return NeighbourMetric(f"Precision@{k}", lambda relevant: k, lambda near, r: precisions_at_k(near, r, k))
    if name not in NEIGHBOUR_METRICS:
        raise one_of("metric", name, [*NEIGHBOUR_METRICS, f"{PRECISION}10", NMI])
    return NEIGHBOUR_METRICS[name]


def titles(names: Iterable[str]) -> dict[str, str]:
    """Name -> what people read, of "nmi" and of those that :func:`neighbour_metric` knows."""
    return {name: "NMI" if name == NMI else neighbour_metric(name).title for name in names}
