"""Triplet margin losses with Manhattan and Euclidean distances."""

from torch import Tensor

from metric_kd.distances import Pairwise
from metric_kd.errors import UserError
from metric_kd.losses.samplers import SAMPLERS, DistanceWeighted, Triplets
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


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
    return (near - far + margin).clamp(min=0.0).mean()


class TripletTerm(Term):
    """Base of the losses over sampled triplets: ``sample`` is a name of ``SAMPLERS``, ``margin`` a distance.

    reference_maximum: sample as the RKD code does, see :class:`~metric_kd.losses.samplers.DistanceWeighted`.

    A batch without triplets costs nothing and has a zero gradient. Raises ``UserError`` for an unknown sampler or a
    negative margin.
    """

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
        return self.over(pairs, self.sampler(pairs, batch.labels))

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        """The loss of the given triplets."""
        raise TypeError(f"{type(self).__name__} does not define over(pairs, triplets).")


@TERMS.register("l1_triplet")
class L1Triplet(TripletTerm):
    """:func:`l1_triplet` over sampled triplets; samplers compare Euclidean distances here too (as in the RKD code)."""

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return l1_triplet(pairs, *triplets, margin=self.margin)


@TERMS.register("l2_triplet")
class L2Triplet(TripletTerm):
    """:func:`l2_triplet` over sampled triplets."""

    def over(self, pairs: Pairwise, triplets: Triplets) -> Tensor:
        return l2_triplet(pairs, *triplets, margin=self.margin)
