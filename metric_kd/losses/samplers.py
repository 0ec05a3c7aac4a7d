"""Triplet samplers: which (anchor, positive, negative) of a batch to use.

A sampler is called with embeddings (N, D) and labels (N,) and returns three int64 index tensors of one length. Positive
pairs come in row-major order (anchor ascending, then positive). Anchors without a negative give no triplet, and a batch
without a pair or without a second class gives three empty tensors. No gradient passes. Draws come from torch's global
generator of the embeddings' device.

The rules are those of the RKD authors' code (arXiv 1904.05068); deviations stand with each class.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metric_kd.distances import COINCIDENT, Pairwise, unit_rows
from metric_kd.errors import UserError
from metric_kd.registry import Registry


class Triplets(NamedTuple):
    """Rows of the batch; all three (T,) int64."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


def masks(pairs: Pairwise, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) bool: the positive pairs of anchors that have a negative, and the negative pairs.

    Raises ``UserError`` unless there is one label for each embedding.
    """
    if labels.shape != (len(pairs),):
        raise UserError(f"a sampler needs one label per embedding; got {tuple(labels.shape)} for {len(pairs)} rows.")
    same = labels[:, None] == labels[None, :]
    negatives = ~same
    return same.fill_diagonal_(False) & negatives.any(1, keepdim=True), negatives


class TripletSampler:
    """Base: finds the positive pairs and lets :meth:`choose` pick one negative for each."""

    def __call__(self, embeddings: Tensor | Pairwise, labels: Tensor) -> Triplets:
        """Raises ``UserError`` unless there is one label for each embedding."""
        pairs = Pairwise.of(embeddings)
        with torch.no_grad():
            positives, negatives = masks(pairs, labels)
            anchor, positive = positives.nonzero().unbind(1)
            if not len(anchor):
                return Triplets(anchor, positive, anchor.clone())
            return self.choose(pairs, negatives, anchor, positive)

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        """negatives: (N, N) bool, with at least one in every row that ``anchor`` names; (P,) positive pairs, P > 0."""
        raise TypeError(f"{type(self).__name__} does not define choose(pairs, negatives, anchor, positive).")


SAMPLERS: Registry[type[TripletSampler]] = Registry("sampler")
"""The samplers by the names that ``--sample`` takes."""


class _NegativeLists(NamedTuple):
    """The negatives of every row, one list after the other: row i owns columns[start[i] : start[i] + length[i]]."""

    columns: Tensor
    start: Tensor
    length: Tensor

    @classmethod
    def of(cls, negatives: Tensor) -> "_NegativeLists":
        length = negatives.sum(1)
        return cls(negatives.nonzero()[:, 1], length.cumsum(0) - length, length)


@SAMPLERS.register("all")
class AllPairs(TripletSampler):
    """Every positive pair with every negative of its anchor, negatives ascending innermost."""

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        pair, negative = negatives.index_select(0, anchor).nonzero().unbind(1)
        # index_select takes half of the time of indexing.
        return Triplets(anchor.index_select(0, pair), positive.index_select(0, pair), negative.contiguous())


@SAMPLERS.register("random")
class RandomNegative(TripletSampler):
    """Every positive pair with one negative of its anchor, all equally likely."""

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        lists = _NegativeLists.of(negatives)
        count = lists.length[anchor]
        draw = torch.rand(len(anchor), device=anchor.device, dtype=torch.float64)
        rank = (draw * count).long()  # draw < 1 in float64: the product does not round up to count
        return Triplets(anchor, positive, lists.columns[lists.start[anchor] + rank])


def _comparable(pairs: Pairwise) -> Tensor:
    """A copy of the squared distances with the largest finite number for NaN and overflow, so below masked entries."""
    largest = torch.finfo(pairs.squared.dtype).max
    return pairs.squared.detach().nan_to_num(nan=largest, posinf=largest)


@SAMPLERS.register("hard")
class HardNegative(TripletSampler):
    """Every positive pair with its anchor's closest negative; a coincident one only for want of another.

    The reference means to leave out coincident negatives too, but its distances are never zero off the diagonal. An
    anchor without negatives, for which the reference returns row 0, gives no triplet.
    """

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        squared = _comparable(pairs)
        squared.masked_fill_(squared <= COINCIDENT, torch.finfo(squared.dtype).max)
        return Triplets(anchor, positive, squared.masked_fill_(~negatives, float("inf")).argmin(1)[anchor])


@SAMPLERS.register("semihard")
class SemiHardNegative(TripletSampler):
    """Every positive pair with the closest negative that is farther than the positive; the farthest where none is."""

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        squared = _comparable(pairs)
        count = negatives.sum(1, keepdim=True)
        ordered, order = squared.masked_fill(~negatives, float("inf")).sort(1)
        farther = torch.searchsorted(ordered, squared, right=True)  # for every (anchor, positive)
        negative = order.gather(1, farther.minimum(count - 1).clamp_(min=0))
        return Triplets(anchor, positive, negative[anchor, positive])


FARTHEST = 4.0
"""The largest squared distance of two unit rows; rows that are not finite count as so far."""

BELOW_ANY = 1e9
"""What is taken from the log weights of pairs that may not be drawn, so that the maximum passes over them."""

LEAST_EXPONENT = -80.0
"""exp of it, 2e-35, is as good as never; numbers below 1e-38 are slow to compute with."""


@SAMPLERS.register("distance")
class DistanceWeighted(TripletSampler):
    """Every positive pair with a negative drawn so that distances up to a cut-off come up about equally often.

    On the unit sphere in D dimensions pairs at distance d have density q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2); negatives
    are drawn with probability ~ 1/q(max(d, cut_off)) among those nearer than ``nonzero_loss_cutoff``, and uniformly
    for an anchor that has none so near. Embeddings are normalised here; D is their width.

    Wu, Manmatha, Smola, Kraehenbuehl: Sampling Matters in Deep Embedding Learning, 2017, arXiv 1706.07567. As the RKD
    code, except that log weights are shifted by their maximum over the valid negatives only. The RKD code takes it over
    the whole row; in float32 at 512 dimensions all weights of negatives then underflow and the draw is uniform.
    ``reference_maximum=True`` restores that.
    """

    def __init__(self, cut_off: float = 0.5, nonzero_loss_cutoff: float = 1.4, reference_maximum: bool = False):
        if not 0 < cut_off < nonzero_loss_cutoff:
            raise UserError(
                f"distance sampling needs 0 < cut_off < nonzero_loss_cutoff; got {cut_off}, {nonzero_loss_cutoff}."
            )
        self.cut_off = cut_off
        self.nonzero_loss_cutoff = nonzero_loss_cutoff
        self.reference_maximum = reference_maximum

    def weights(self, embeddings: Tensor | Pairwise, labels: Tensor) -> Tensor:
        """(N, N) probabilities of column j as the negative of anchor i; rows sum to 1, or to 0 without negatives."""
        with torch.no_grad():
            return self._weights(Pairwise.of(embeddings), labels[:, None] != labels[None, :])

    def _weights(self, pairs: Pairwise, negatives: Tensor) -> Tensor:
        # Masks are numbers here: selecting by a mask without pattern costs a CPU ten times as much as multiplying.
        width = pairs.x.shape[1]
        squared = Pairwise(unit_rows(pairs.x.detach())).squared.fill_diagonal_(1.0)
        squared.nan_to_num_(nan=FARTHEST).clamp_(min=self.cut_off**2)
        # Antipodal rows have 1 - d^2/4 = 0 or, rounded, less.
        cap = (1 - squared / 4).clamp_(min=1e-8)
        log_weights = squared.log().mul_((2 - width) / 2).sub_(cap.log_(), alpha=(width - 3) / 2)
        negative = negatives.to(squared)
        valid = torch.lt(squared, self.nonzero_loss_cutoff**2, out=squared).mul_(negative)
        if self.reference_maximum:
            exponents = log_weights - log_weights.amax(1, keepdim=True)
        else:
            top = torch.sub(valid, 1).mul_(BELOW_ANY).add_(log_weights).amax(1, keepdim=True)
            exponents = (log_weights - top).clamp_(min=LEAST_EXPONENT, max=0.0)
        weights = exponents.exp_().mul_(valid)
        weights.addcmul_(negative, (weights.sum(1, keepdim=True) <= 0).to(weights))
        return weights.div_(weights.sum(1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny))

    def choose(self, pairs: Pairwise, negatives: Tensor, anchor: Tensor, positive: Tensor) -> Triplets:
        n = len(pairs)
        # One increasing sequence for the whole batch: row i climbs from i to i + 1, so one search serves every pair.
        climb = self._weights(pairs, negatives).cumsum(1, dtype=torch.float64).clamp_(max=1.0)
        offset = torch.arange(n, device=climb.device)
        sequence = (climb + offset[:, None]).flatten()
        last = torch.searchsorted(sequence, climb[:, -1] + offset)  # the row's last column that has weight
        draw = anchor + torch.rand(len(anchor), device=climb.device, dtype=torch.float64) * climb[anchor, -1]
        place = torch.searchsorted(sequence, draw, right=True).minimum(last[anchor])
        return Triplets(anchor, positive, place - anchor * n)
