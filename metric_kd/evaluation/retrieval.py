"""evaluate_retrieval: Recall@K and other metrics of one network's embeddings, with query and gallery sets and cameras where a
data set has them."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.clustering import clustering_nmi
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.metrics import (
    NMI,
    PRECISION,
    mean_over_queries,
    neighbour_metric,
    recall_at_k,
    relevant_counts,
)
from metric_kd.evaluation.reidentification import reidentify
from metric_kd.evaluation.search import check_ks, find_neighbours
from metric_kd.types import Neighbours

__all__ = ["check_ks", "check_metrics", "evaluate_retrieval", "gallery_size"]

HELD = 1 << 23
"""Neighbours that are held at once for metrics that need many of them (96 MiB)."""


def gallery_size(count: int, query: np.ndarray | None = None, gallery: np.ndarray | None = None) -> int:
    """What ``check_ks`` wants: images that a query of a data set of ``count`` images can retrieve, itself left out.

    query, gallery: (count,) bool, or None where every image is one.
    """
    queries = np.ones(count, bool) if query is None else np.asarray(query, bool)
    candidates = np.ones(count, bool) if gallery is None else np.asarray(gallery, bool)
    return int(candidates.sum()) - int((candidates & queries).any())


def check_metrics(
    metrics: Sequence[str], labels: np.ndarray, query: np.ndarray | None = None, gallery: np.ndarray | None = None
) -> None:
    """Raise ``UserError`` where a data set cannot give these metrics; cheap, to be called before long work.

    labels: (count,) classes of the data set's images; query, gallery: as for :func:`gallery_size`.
    """
    names = [name for name in metrics if name != NMI]
    if not names:
        return
    for name in names:
        wanted = neighbour_metric(name).wanted
        if name.startswith(PRECISION):
            check_ks([wanted(torch.zeros(1))], gallery_size(len(labels), query, gallery))
    rows = torch.arange(len(labels))
    asked, offered = _chosen(query, "query", rows), _chosen(gallery, "gallery", rows)
    classes = torch.as_tensor(labels)
    if not relevant_counts(classes[asked], classes[offered], rows[asked], rows[offered]).any():
        raise UserError(
            f"no query has another image of its class in the gallery, which {names[0]} needs; leave --metrics out or check "
            "the labels."
        )


def evaluate_retrieval(
    embeddings: Embeddings,
    ks: Iterable[int],
    *,
    query: np.ndarray | Tensor | None = None,
    gallery: np.ndarray | Tensor | None = None,
    cameras: np.ndarray | Tensor | None = None,
    metrics: Sequence[str] = (),
    seed: int = 0,
    offered_by: Embeddings | None = None,
) -> tuple[dict[str, float], Neighbours]:
    """({"recall@K": fraction}, the max(ks) nearest neighbours of every query); with cameras rank1, rank5, rank10 and mAP too.

    query, gallery: bool, one entry per row of the *data set* (looked up by ``embeddings.indices``, so the order of the
    embeddings does not matter), or None where every image is one. An image that is both never retrieves itself; a query
    whose class has no other image in the gallery is a miss. The neighbours' indices count the gallery's images, in the
    order of the embeddings.

    offered_by: another network's embeddings of the same images, in the same order and of the same length, from which the
    gallery is taken instead.

    metrics: more of them, from the same search: "map@r", "r_precision", "precision@K"
    (:mod:`metric_kd.evaluation.metrics`; queries that have no relevant image are left out, with a warning), and "nmi", of
    the queries' classes and as many k-means clusters of the queries, drawn with ``seed``. A search for many neighbours goes
    by parts of the queries: memory holds ``HELD`` neighbours.

    cameras: integers, one entry per row of the data set, or None. Rank-k and mAP are those of :func:`reidentify`: an image
    of the query's class by the query's camera does not count, where Recall@K counts it as a hit. Queries that have no
    match are left out of them, with a warning that says how many. Raises ``UserError`` for an empty side, and as
    :func:`find_neighbours` and :func:`reidentify` do.
    """
    ks = list(ks)
    asked, offered = _chosen(query, "query", embeddings.indices), _chosen(gallery, "gallery", embeddings.indices)
    both = bool((asked & offered).any())
    check_ks(ks, int(offered.sum()) - int(both))
    names = [name for name in metrics if name != NMI]
    neighbours, more = _search(embeddings, asked, offered, max(ks), names, offered_by)
    values = {f"recall@{k}": value for k, value in recall_at_k(neighbours, ks).items()}
    if NMI in metrics:
        more[NMI] = clustering_nmi(embeddings.vectors[asked], embeddings.labels[asked], seed=seed)
    values |= {name: more[name] for name in metrics}
    if cameras is not None:
        values |= _across_cameras(embeddings, asked, offered, _entries(cameras, "camera", embeddings.indices))
    return values, neighbours


def _search(
    embeddings: Embeddings,
    asked: Tensor,
    offered: Tensor,
    keep: int,
    names: Sequence[str],
    offered_by: Embeddings | None = None,
) -> tuple[Neighbours, dict[str, float]]:
    """The ``keep`` nearest neighbours of every query, and the means over queries that ``names`` name."""
    if offered_by is not None and not torch.equal(offered_by.indices, embeddings.indices):
        raise UserError("queries and gallery are embeddings of other images; embed the same ones, in the same order.")
    whole, other = bool(asked.all()) and bool(offered.all()), embeddings if offered_by is None else offered_by
    queries, gallery = (embeddings, other) if whole else (_part(embeddings, asked), _part(other, offered))
    metrics = {name: neighbour_metric(name) for name in names}
    relevant = relevant_counts(queries.labels, gallery.labels, queries.indices, gallery.indices)
    wanted = max([keep, *(metric.wanted(relevant) for metric in metrics.values())])
    check_ks([wanted], len(gallery.labels) - int((asked & offered).any()))
    indices, distances = [], []
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    for part in torch.arange(len(queries.labels)).split(max(1, HELD // wanted)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        found = find_neighbours(
            queries.vectors[rows],
            gallery.vectors,
            wanted,
            query_labels=queries.labels[rows],
            gallery_labels=gallery.labels,
            query_ids=queries.indices[rows],
            gallery_ids=gallery.indices,
        )
        for name, metric in metrics.items():
            values[name].append(metric.values(found, relevant[rows]))
        indices.append(found.indices[:, :keep].clone())
        distances.append(found.distances[:, :keep].clone())
        del found
    left_out = int((relevant == 0).sum())
    if names and 0 < left_out < len(relevant):
        warnings.warn(
            f"{left_out} of {len(relevant)} queries have no other image of their class in the gallery; "
            f"{', '.join(names)} leave them out.",
            stacklevel=3,
        )
    kept = Neighbours(torch.cat(indices), torch.cat(distances), queries.labels, gallery.labels)
    return kept, {name: mean_over_queries(torch.cat(parts)) for name, parts in values.items()}


def _part(embeddings: Embeddings, chosen: Tensor) -> Embeddings:
    return Embeddings(*(column[chosen] for column in embeddings))


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
