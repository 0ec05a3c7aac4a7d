"""reidentify: rank-k accuracy and mAP of finding a person again on another camera, as on Market-1501."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metric_kd.errors import UserError, one_of
from metric_kd.evaluation.search import as_integers, as_vectors, check_shapes

RANKS = (1, 5, 10)
TITLES = {**{f"rank{k}": f"Rank-{k}" for k in RANKS}, "mAP": "mAP"}
"""Metric -> its name for people."""
TILE = 1 << 21
"""Distances held at once; 40 bytes of working memory go with each, 80 where all tie (160 MiB)."""

Interpolation = Literal["none", "trapezoid"]


class ReIdentification(NamedTuple):
    """metrics: {"rank<k>", "mAP"}, fractions over the queries that have a match.

    first: (Q,) int64, how many images rank before a query's first match, -1 where it has none; average_precision: (Q,)
    float64, NaN where there is none; left_out: the number of queries without a match.
    """

    metrics: dict[str, float]
    first: Tensor
    average_precision: Tensor
    left_out: int


def reidentify(
    query: Tensor,
    gallery: Tensor,
    *,
    query_labels: Tensor,
    gallery_labels: Tensor,
    query_cameras: Tensor,
    gallery_cameras: Tensor,
    ranks: Iterable[int] = RANKS,
    interpolation: Interpolation = "none",
    block: int = 1024,
) -> ReIdentification:
    """Rank every gallery image by its Euclidean distance to every query and score where the matches come.

    query: (Q, D), gallery: (G, D); labels and cameras: (Q,) and (G,) integers. Of the gallery, a query does not see the
    images of its own person on its own camera (itself among them, where it is in the gallery). A match is its person on
    another camera; everything else counts against it. With n matches, the k-th of them at position p_k from 1:

        rank-K = mean over queries [ p_1 <= K ]            mAP = mean over queries of 1/n sum_k k / p_k

    (the cumulative matching characteristic, CMC, at K; and the mean of the precision at every match, not interpolated).
    The Matlab code published with the data set takes the mean of the precision at and just before each match instead,
    1/n sum_k (k / p_k + (k - 1) / (p_k - 1)) / 2 with 0/0 = 1, which is a little lower or equal: interpolation =
    "trapezoid". Queries without a match are left out of the means and counted. Junk (person -1 in the file names) must
    not be in the gallery; distractors are, with a label that no query has.

    Exact: squared distances are taken in float64, about the gallery's mean, and those that rounding could have told
    apart are ties, which go to the lower row of the gallery. Memory beyond the embeddings is a float64 copy of the gallery
    and blocks of at most ``block`` queries and ``TILE`` distances (or one query); there is no Q x G matrix, and no result
    depends on the block.

    Raises ``UserError`` where an embedding is not finite, sizes differ, a rank is below 1, or no query has a match.
    Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """
    ranks = list(ranks)
    if not ranks or min(ranks) < 1:
        raise UserError(f"ranks {ranks} are not possible; give whole numbers of 1 or more, as in 1 5 10.")
    if interpolation not in ("none", "trapezoid"):
        raise one_of("interpolation", interpolation, ["none", "trapezoid"])
    query, gallery = as_vectors(query, "query"), as_vectors(gallery, "gallery")
    query_labels, query_cameras = as_integers(query_labels), as_integers(query_cameras)
    gallery_labels, gallery_cameras = as_integers(gallery_labels), as_integers(gallery_cameras)
    check_shapes(query, gallery, (query_labels, query_cameras), (gallery_labels, gallery_cameras))

    rows = max(1, min(block, TILE // len(gallery)))
    offered = gallery.double()
    centre = offered.mean(0)
    offered -= centre
    squares = torch.linalg.vecdot(offered, offered)
    first = torch.empty(len(query), dtype=torch.int64)
    precision = torch.empty(len(query), dtype=torch.float64)
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        same = query_labels[part, None] == gallery_labels
        elsewhere = query_cameras[part, None] != gallery_cameras
        order = _ranking(query[part].double() - centre, offered, squares, unseen=same & ~elsewhere)
        first[part], precision[part] = _score((same & elsewhere).gather(1, order), interpolation)

    counted = first >= 0
    total = int(counted.sum())
    if total == 0:
        raise UserError(
            "no query has an image of its person by another camera in the gallery; check labels and cameras."
        )
    metrics = {f"rank{k}": int((first[counted] < k).sum()) / total for k in ranks}
    metrics["mAP"] = float(precision[counted].mean())
    return ReIdentification(metrics, first, precision, len(query) - total)


def _ranking(query: Tensor, gallery: Tensor, squares: Tensor, unseen: Tensor) -> Tensor:
    """(B, G) rows of the gallery, nearest to each of the (B, D) queries first, those of the mask ``unseen`` last."""
    own = torch.linalg.vecdot(query, query)[:, None]
    far = torch.addmm(squares, query, gallery.T, alpha=-2).add_(own).masked_fill_(unseen, torch.inf)
    near, order = far.sort(dim=1)
    # A product of D terms is off by at most D/2 epsilon of the lengths, a squared distance by D, two of them by 2 D.
    rounding = 2 * (query.shape[1] + 8) * torch.finfo(torch.float64).eps * (own + squares.max())
    tied = near.diff(dim=1) <= rounding  # between two unseen it is NaN, which compares false
    crowded = tied.any(1).nonzero()[:, 0]
    if len(crowded):
        group = F.pad((~tied[crowded]).cumsum(1), (1, 0))
        place = group.mul_(len(gallery)).add_(order[crowded])
        order[crowded] = place.sort(dim=1).values % len(gallery)
    return order


def _score(hits: Tensor, interpolation: Interpolation) -> tuple[Tensor, Tensor]:
    """(first match from 0, average precision) of each row of (B, G) hits in ranked order; -1 and NaN without one."""
    row, position = hits.nonzero(as_tuple=True)  # by row, then by position
    count = hits.sum(1)
    before = torch.arange(len(row)) - (count.cumsum(0) - count)[row]  # matches that come before this one
    first = torch.full((len(hits),), -1)
    first[row[before == 0]] = position[before == 0]
    precision = (before + 1).double() / (position + 1)
    if interpolation == "trapezoid":
        precision = (precision + torch.where(position > 0, before.double() / position, 1.0)) / 2
    total = torch.zeros(len(hits), dtype=torch.float64).index_add_(0, row, precision)
    return first, total / count
