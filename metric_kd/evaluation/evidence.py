"""What two embeddings share, and how one of them fills its space; without labels, but for :func:`alignment`."""

import torch
from torch import Tensor

from metric_kd.distances import unit_rows
from metric_kd.errors import UserError
from metric_kd.evaluation.agreement import shared_counts
from metric_kd.types import Neighbours

SHARE = 1 << 22
"""Similarities that are held at once (16 MiB)."""


def neighbour_overlap(first: Neighbours, second: Neighbours, k: int) -> Tensor:
    """(Q,) float64: |N_k(first) with N_k(second)| / k, the share of the k nearest that two networks have in common.

    Both of the same queries and gallery. Raises ``UserError`` where fewer than k were searched, or queries differ in number.
    """
    one, other = _searched(first, k), _searched(second, k)
    if len(one) != len(other):
        raise UserError(f"overlap compares the same queries; got {len(one)} and {len(other)}.")
    return shared_counts(one, other).double() / k


def rank_biased_overlap(first: Neighbours, second: Neighbours, p: float = 0.9, k: int | None = None) -> Tensor:
    """(Q,) float64: rank-biased overlap of two lists of neighbours, extrapolated from their first k,

        RBO = A_k p^k + (1 - p)/p sum_{d=1}^k A_d p^d,   A_d = |first d of one with first d of the other| / d

    The top counts most: a share 1 - p^d of the weight lies, roughly, on the first d. 1 for equal lists, 0 where nothing is
    shared. k: all that were searched by default. Raises ``UserError`` for p outside (0, 1), and as :func:`neighbour_overlap`.

    Webber, Moffat, Zobel: A Similarity Measure for Indefinite Rankings, 2010, equation 30 (RBO_ext, lists of one length).
    """
    if not 0 < p < 1:
        raise UserError(f"rank-biased overlap needs p between 0 and 1; got {p:g}.")
    k = min(first.indices.shape[1], second.indices.shape[1]) if k is None else k
    one, other = _searched(first, k), _searched(second, k)
    if len(one) != len(other):
        raise UserError(f"overlap compares the same queries; got {len(one)} and {len(other)}.")
    depth = torch.arange(1, k + 1, dtype=torch.float64)
    found = []
    rows = max(1, SHARE // (k * k))
    for a, b in zip(one.split(rows), other.split(rows), strict=True):
        same = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]
        # A pair at places (i, j) is shared from depth max(i, j) on.
        place = torch.maximum(depth[:, None], depth[None, :]).long()
        first_shared = torch.where(same, place, 0).flatten(1)
        counts = torch.zeros(len(a), k + 1, dtype=torch.float64).scatter_add_(
            1, first_shared, torch.ones(first_shared.shape, dtype=torch.float64)
        )[:, 1:]
        agreement = counts.cumsum(1) / depth
        found.append(agreement[:, -1] * p**k + (1 - p) / p * (agreement * p**depth).sum(1))
    return torch.cat(found)


def hubness(neighbours: Neighbours, k: int = 10) -> float:
    """Skewness of how often each item of the gallery is among the k nearest: far above 0, few items answer everything.

    0 where every item is equally often one. Raises ``UserError`` where fewer than k neighbours were searched.

    Radovanovic, Nanopoulos, Ivanovic: Hubs in Space, JMLR 2010, equation 1.
    """
    near = _searched(neighbours, k)
    counts = torch.bincount(near[near >= 0], minlength=len(neighbours.gallery_labels)).double()
    spread = counts.std(correction=0)
    return float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred (N, D) embeddings: how many directions are used.

    Between 1 and D; 0 where all rows are equal. In float64.

    Roy, Vetterli: The effective rank, EUSIPCO 2007 (there without centring).
    """
    rows = x.double()
    values = torch.linalg.svdvals(rows - rows.mean(0))
    total = values.sum()
    if not total > 1e-12:
        return 0.0
    share = values / total
    return float(torch.exp(torch.special.entr(share).sum()))


def alignment(x: Tensor, labels: Tensor) -> float:
    """Mean squared distance between unit embeddings of one class, over all pairs of it: 0 is best, 4 opposite.

    x: (N, D); labels: (N,). NaN where no class has two images. Through class sums, O(N D).

    Wang, Isola: Understanding Contrastive Representation Learning through Alignment and Uniformity, ICML 2020,
    arXiv 2005.10242 (alpha 2; positive pairs there are two views, here two images of a class).
    """
    rows = unit_rows(x).double()
    _, place = labels.unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, rows.shape[1], dtype=torch.float64).index_add_(0, place, rows)
    counts = place.bincount().double()
    pairs = (counts * (counts - 1)).sum()
    if pairs == 0:
        return float("nan")
    lengths = torch.zeros_like(counts).index_add_(0, place, rows.square().sum(1))
    # sum over ordered pairs of |a - b|^2 = 2 n sum|a|^2 - 2 |sum a|^2
    return float((2 * counts * lengths - 2 * sums.square().sum(1)).sum() / pairs)


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |a - b|^2) over all pairs of unit embeddings: the lower, the better the sphere is filled.

    x: (N, D), N >= 2; 0 where all are equal, about -2 t at best. Raises ``UserError`` for fewer rows.

    Wang, Isola, 2020, arXiv 2005.10242.
    """
    if len(x) < 2:
        raise UserError("uniformity compares pairs of embeddings; give two or more.")
    rows, total = unit_rows(x).float(), 0.0
    lengths = rows.square().sum(1)  # 1, but 0 of a vector of zeros
    step = max(1, SHARE // len(rows))
    for part, own in zip(rows.split(step), lengths.split(step), strict=True):
        total += float((t * (2 * part @ rows.T - own[:, None] - lengths)).exp().sum(dtype=torch.float64))
    n = len(rows)
    return float(torch.tensor((total - n) / (n * (n - 1)), dtype=torch.float64).clamp(min=1e-300).log())


def per_class(values: Tensor, labels: Tensor) -> dict[int, float]:
    """{class: mean of the values of its queries}, NaN (a query without a value) left out; classes without any are absent."""
    kept = ~values.isnan()
    classes, place = labels[kept].unique(return_inverse=True)
    sums = torch.zeros(len(classes), dtype=torch.float64).index_add_(0, place, values[kept].double())
    return dict(zip(classes.tolist(), (sums / place.bincount(minlength=len(classes))).tolist(), strict=True))


def _searched(neighbours: Neighbours, k: int) -> Tensor:
    if not 1 <= k <= neighbours.indices.shape[1]:
        raise UserError(f"{neighbours.indices.shape[1]} neighbours were searched; ask for 1 to that many, not {k}.")
    return neighbours.indices[:, :k]
