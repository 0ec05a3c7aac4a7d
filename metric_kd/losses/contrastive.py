"""Contrastive loss over the two pairs of every triplet."""

import torch
from torch import Tensor

from metric_kd.distances import Pairwise
from metric_kd.losses.samplers import Triplets
from metric_kd.losses.term import TERMS
from metric_kd.losses.triplet import TripletTerm


def contrastive(
    embeddings: Tensor | Pairwise, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2
) -> Tensor:
    """Mean over the 2 T pairs of d(a, p)^2 and max(0, margin - d(a, n))^2, with d(a, b) = |a - b + 1e-6|_2.

    embeddings (N, D), half types raised to float32; anchor, positive, negative: (T,) rows. T = 0 gives 0 with a zero
    gradient. A positive pair counts once for every triplet that holds it.

    Hadsell, Chopra, LeCun: Dimensionality Reduction by Learning an Invariant Mapping, 2006,
    doi 10.1109/CVPR.2006.100. Deviation: without the factors of one half, and over the pairs of sampled triplets (as in
    the RKD code).
    """
    pairs = Pairwise.of(embeddings)
    if not len(anchor):
        return pairs.x.sum() * 0.0
    distances, row = pairs.offset_distances().flatten(), anchor * len(pairs)
    near, far = distances.index_select(0, row + positive), distances.index_select(0, row + negative)
    return torch.cat((near.square(), (margin - far).clamp(min=0.0).square())).mean()


@TERMS.register("contrastive")
class Contrastive(TripletTerm):
    """:func:`contrastive` over sampled triplets."""

    paper = "Dimensionality Reduction by Learning an Invariant Mapping, 2006, doi 10.1109/CVPR.2006.100"

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return contrastive(pairs, *triplets, margin=self.margin)
