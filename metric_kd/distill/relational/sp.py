"""Similarity-preserving distillation: images that are similar to the teacher are similar to the student."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import Pairwise, full_precision, paired, unit_rows
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared gap between two matrices of inner products, each with rows of length one.

    With F the flattened features of the batch, G = F F^T and G^ its rows divided by their lengths; loss = mean over all
    N^2 of (G^_ij(student) - G^_ij(teacher))^2.

    student (N, ...), teacher (N, ...): maps or rows of any shapes; half types are raised to float32; no gradient
    reaches the teacher. N < 2 gives 0. Raises ``UserError`` where the numbers of images differ.

    Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019, arXiv 1907.09682. Deviation: a row of G shorter than
    1e-6 of the batch's mean squared length becomes zero and gets no gradient, where the usual code's gradient explodes.
    """
    if student.ndim < 2 or teacher.ndim < 2:
        raise UserError(f"sp compares features (N, ...); got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    first, second = paired(Pairwise(student.flatten(1)), Pairwise(teacher.detach().flatten(1)))
    if len(first) < 2:
        return first.x.sum() * 0.0
    with full_precision(student):
        return mse_loss(_similarity(first), _similarity(second).to(first.x))


def _similarity(rows: Pairwise) -> Tensor:
    gram = rows.gram
    # One factor for all rows drops out; it makes "short" relative, and keeps squares within float32.
    scale = gram.detach().diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    return unit_rows(gram / scale)


@TERMS.register("sp")
class SP(Term):
    """Mean of :func:`sp` over several stages, or :func:`sp` of the embeddings.

    ``features``: "maps" or "embedding"; ``layers`` as in ``2/3/4``, the last three stages by default. Raises
    ``UserError`` for options out of range.

    Default weight 3000, the KD Zoo's.
    """

    needs = ("maps",)
    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 C H W"
    default_weight = 3000.0
    paper = "Similarity-Preserving Knowledge Distillation, 2019, arXiv 1907.09682"

    def __init__(self, layers: str = "", features: str = "maps"):
        super().__init__()
        if features not in ("maps", "embedding"):
            raise one_of("features of loss 'sp':", features, ["maps", "embedding"])
        self.layers, self.features = parse_layers(layers), features
        if features == "embedding" and self.layers:
            raise UserError("sp compares embeddings or stages, not both; leave out layers, or give features=maps.")
        self.needs = (features,)  # type: ignore[misc]  # an option chooses among what the class could declare

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        self._pairs(student, teacher)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return torch.stack([sp(s, t) for s, t in self._pairs(student, teacher)]).mean()

    def _pairs(self, student: Output, teacher: Output | None) -> list[MapPair]:
        if self.features == "maps":
            return paired_maps(student, teacher, self.layers)
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return [(student.embedding, teacher.embedding)]
