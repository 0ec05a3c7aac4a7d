"""Contrastive loss over the two pairs of every triplet."""

import torch
from torch import Tensor

from metric_kd.distances import Pairwise
from metric_kd.losses.samplers import Triplets, masks
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


def contrastive_all(embeddings: Tensor | Pairwise, labels: Tensor, margin: float = 0.2) -> Tensor:
    """:func:`contrastive` over every triplet of the batch, which the sampler ``all`` lists, without listing them.

    A positive pair (a, p) counts once for each negative of a, and (a, n) once for each positive of a: every pair has a
    count, and nothing larger than N x N is made. labels (N,); ``UserError`` unless there is one for each embedding.
    """
    pairs = Pairwise.of(embeddings)
    positives, negatives = masks(pairs, labels)
    if not positives.any():
        return pairs.x.sum() * 0.0
    distances = pairs.offset_distances()
    near = distances.square().masked_fill(~positives, 0.0).sum(1)
    far = (margin - distances).clamp(min=0.0).square().masked_fill(~negatives, 0.0).sum(1)
    near_count, far_count = positives.sum(1), negatives.sum(1)
    return (near * far_count + far * near_count).sum() / (2 * (near_count * far_count).sum())


@TERMS.register("contrastive")
class Contrastive(TripletTerm):
    """:func:`contrastive` over sampled triplets."""

    paper = "Dimensionality Reduction by Learning an Invariant Mapping, 2006, doi 10.1109/CVPR.2006.100"

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return contrastive(pairs, *triplets, margin=self.margin)

    def over_all(self, pairs: Pairwise, labels: Tensor) -> Tensor:
        return contrastive_all(pairs, labels, self.margin)
