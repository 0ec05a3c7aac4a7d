"""Triplet margin losses with Manhattan and Euclidean distances."""

from typing import Any

import torch
from torch import Tensor

from metric_kd.distances import Pairwise, full_precision
from metric_kd.errors import UserError
from metric_kd.losses.samplers import SAMPLERS, AllPairs, DistanceWeighted, Triplets, masks
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

TILE = {"cpu": 2**17, "cuda": 2**23}
"""Triplets in work at a time: 512 KiB in float32 stay in a core's second-level cache."""


def l1_triplet(
    embeddings: Tensor | Pairwise, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2
) -> Tensor:
    """Mean over triplets of max(0, margin + d(a, p) - d(a, n)) with d(a, b) = |a - b + 1e-6|_1.

    embeddings (N, D), half types raised to float32; anchor, positive, negative: (T,) rows. T = 0 gives 0 with a zero
    gradient. Equals ``torch.nn.functional.triplet_margin_loss`` on the gathered rows, in O(N^2) memory instead
    of O(T D).

    Schroff, Kalenichenko, Philbin: FaceNet, 2015, arXiv 1503.03832. Deviation: distances are not squared (as in the RKD
    code), and the mean counts triplets that already keep the margin.
    """
    return _margin_loss(embeddings, anchor, positive, negative, margin, p=1)


def l2_triplet(
    embeddings: Tensor | Pairwise, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2
) -> Tensor:
    """As :func:`l1_triplet` with d(a, b) = |a - b + 1e-6|_2."""
    return _margin_loss(embeddings, anchor, positive, negative, margin, p=2)


def _margin_loss(
    embeddings: Tensor | Pairwise, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, p: int
) -> Tensor:
    pairs = Pairwise.of(embeddings)
    if not len(anchor):
        return pairs.x.sum() * 0.0
    distances, row = pairs.offset_distances(p).flatten(), anchor * len(pairs)
    near, far = distances.index_select(0, row + positive), distances.index_select(0, row + negative)
    return (near - far + margin).relu().mean()  # its slope at zero is 0, that of clamp depends on torch's version


def l1_triplet_all(embeddings: Tensor | Pairwise, labels: Tensor, margin: float = 0.2) -> Tensor:
    """:func:`l1_triplet` over every triplet of the batch, which the sampler ``all`` lists, without listing them.

    embeddings (N, D), labels (N,). Extra memory O(N^2); the gradient can be taken once. ``UserError`` unless there is
    one label for each embedding.
    """
    return _margin_loss_of_all(embeddings, labels, margin, p=1)


def l2_triplet_all(embeddings: Tensor | Pairwise, labels: Tensor, margin: float = 0.2) -> Tensor:
    """:func:`l2_triplet` over every triplet of the batch, as :func:`l1_triplet_all`."""
    return _margin_loss_of_all(embeddings, labels, margin, p=2)


def _margin_loss_of_all(embeddings: Tensor | Pairwise, labels: Tensor, margin: float, p: int) -> Tensor:
    pairs = Pairwise.of(embeddings)
    positives, negatives = masks(pairs, labels)
    if not positives.any():
        return pairs.x.sum() * 0.0
    return _AllMargins.apply(pairs.offset_distances(p), positives, negatives, margin)  # type: ignore[no-any-return, no-untyped-call]


class _AllMargins(torch.autograd.Function):
    """The loss as a function of the (N, N) distances; the gradient is ready when the value is."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
        with full_precision(distances):
            loss, gradient = all_margins(distances, positives, negatives, margin)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None, None


def all_margins(distances: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d distances): the mean of max(0, d_ap - d_an + margin) over the T pairs (a, p) x negatives n of a.

    A triplet that breaks the margin adds 1/T to the slope of d_ap and takes 1/T from that of d_an: counts along an anchor's
    row. Anchors stand in the order of their number of positives, so that a tile of them (anchors x positives x N) has few
    empty places. distances (N, N); positives, negatives (N, N) bool, T > 0.
    """
    n, count = len(distances), positives.sum(1)
    order = count.argsort(descending=True)
    left = count[order].tolist()
    anchor, positive = positives.nonzero().unbind(1)
    place = torch.arange(len(anchor), device=anchor.device) - (count.cumsum(0) - count)[anchor]
    near = distances.new_full((n, left[0]), -float("inf"))  # an empty place and what is no negative break no margin
    near[anchor, place] = distances[anchor, positive]
    near, far = near[order], distances.masked_fill(~negatives, float("inf"))[order]
    near_slope, far_slope = torch.zeros_like(near), torch.zeros_like(far)
    tile, sums, start = TILE.get(distances.device.type, TILE["cpu"]), [], 0
    while start < n and left[start]:
        width = left[start]
        rows = slice(start, start + max(1, tile // (width * n)))
        gap = (near[rows, :width, None] - far[rows, None, :]).add_(margin)
        broken = torch.gt(gap, 0, out=torch.empty_like(gap))
        near_slope[rows, :width] = broken.sum(2)
        far_slope[rows] = broken.sum(1)
        sums.append(gap.relu_().sum())
        start = rows.stop
    gradient, by_place = torch.empty_like(far), torch.empty_like(near)
    gradient[order], by_place[order] = far_slope.neg_(), near_slope
    gradient[anchor, positive] = by_place[anchor, place]
    triplets = (count * negatives.sum(1)).sum()
    return torch.stack(sums).sum() / triplets, gradient.div_(triplets)


class TripletTerm(Term):
    """Base of the losses over sampled triplets: ``sample`` is a name of ``SAMPLERS``, ``margin`` a distance.

    reference_maximum: sample as the RKD code does, see :class:`~metric_kd.losses.samplers.DistanceWeighted`.

    A batch without triplets costs nothing and has a zero gradient. The sampler ``all`` is not run where :meth:`over_all`
    does without triplets; a class with an ``over`` of its own and no ``over_all`` gets the triplets. Raises ``UserError``
    for an unknown sampler or a negative margin.
    """

    reads_labels = True
    relates = True
    cost = "N^2 D + triplets"
    paper = "FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015, arXiv 1503.03832"

    def __init__(self, margin: float = 0.2, sample: str = "all", reference_maximum: bool = False):
        super().__init__()
        if not margin >= 0:
            raise UserError(f"the margin of a triplet loss is a distance; got {margin:g}, give 0 or more.")
        self.margin = margin
        if reference_maximum and sample != "distance":
            raise UserError(
                f"reference_maximum is an option of the sampler 'distance', not of {sample!r}; leave it out."
            )
        self.sampler = DistanceWeighted(reference_maximum=True) if reference_maximum else SAMPLERS[sample]()

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None
        pairs = Pairwise.of(student.embedding)
        if type(self.sampler) is AllPairs:
            return self.over_all(pairs, batch.labels)
        return self.over(pairs, self.sampler(pairs, batch.labels))

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        """The loss of the given triplets."""
        raise TypeError(f"{type(self).__name__} does not define over(pairs, triplets).")

    def over_all(self, pairs: Pairwise, labels: Tensor) -> Tensor:
        """The loss of every triplet of the batch."""
        return self.over(pairs, self.sampler(pairs, labels))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "over" in vars(cls) and "over_all" not in vars(cls):
            cls.over_all = TripletTerm.over_all  # type: ignore[method-assign]  # an inherited one has another formula


@TERMS.register("l1_triplet")
class L1Triplet(TripletTerm):
    """:func:`l1_triplet` over sampled triplets; samplers compare Euclidean distances here too (as in the RKD code)."""

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return l1_triplet(pairs, *triplets, margin=self.margin)

    def over_all(self, pairs: Pairwise, labels: Tensor) -> Tensor:
        return l1_triplet_all(pairs, labels, self.margin)


@TERMS.register("l2_triplet")
class L2Triplet(TripletTerm):
    """:func:`l2_triplet` over sampled triplets."""

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return l2_triplet(pairs, *triplets, margin=self.margin)

    def over_all(self, pairs: Pairwise, labels: Tensor) -> Tensor:
        return l2_triplet_all(pairs, labels, self.margin)
