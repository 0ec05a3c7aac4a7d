"""Attention transfer: the student is active where the teacher is."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.layers import paired_maps, parse_layers, pool_to_smaller
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def at(student: Tensor, teacher: Tensor, p: float = 2, eps: float = 1e-6) -> Tensor:
    """Mean squared gap between normalised attention maps.

    A = sum_c |F_c|^p, one map per image; A^ = A / (|A|_2 + eps) over its H W positions; loss = mean over N H W of
    (A^(student) - A^(teacher))^2.

    student (N, C, H, W), teacher (N, C', H', W'): any channels; the larger grid is averaged down to the smaller one
    first. Half types are raised to float32; no gradient reaches the teacher. Raises ``UserError`` for p < 1, whose
    slope at zero is infinite.

    Zagoruyko, Komodakis: Paying More Attention to Attention, 2017, arXiv 1612.03928. Deviation: the squared gap
    averaged over positions, where the paper takes its norm and sums (as in the usual code, RKD's and the KD Zoo's; eps
    is the Zoo's).
    """
    _check_power(p)
    with full_precision(student):
        student, teacher = pool_to_smaller(at_least_float32(student), teacher.detach().to(at_least_float32(student)))
        return mse_loss(_attention(student, p, eps), _attention(teacher, p, eps))


def _attention(maps: Tensor, p: float, eps: float) -> Tensor:
    energy = (maps.square() if p == 2 else maps.abs().pow(p)).sum(1).flatten(1)
    return energy / (torch.linalg.vector_norm(energy, dim=1, keepdim=True) + eps)


def _check_power(p: float) -> None:
    if not p >= 1:
        raise UserError(f"attention transfer needs a power p of 1 or more; got {p:g}.")


@TERMS.register("at")
class AttentionTransfer(Term):
    """:func:`at` over several stages: ``layers`` as in ``2/3/4``, the last three by default.

    ``reduction`` is ``mean`` over the stages or ``sum`` (RKD's). Raises ``UserError`` for options out of range.

    Default weight 1000, the KD Zoo's.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"
    cost = "N C H W"
    default_weight = 1000.0
    paper = "Paying More Attention to Attention, 2017, arXiv 1612.03928"

    def __init__(self, p: float = 2.0, layers: str = "", reduction: str = "mean"):
        super().__init__()
        _check_power(p)
        if reduction not in ("mean", "sum"):
            raise one_of("reduction of loss 'at':", reduction, ["mean", "sum"])
        self.p, self.layers, self.reduction = p, parse_layers(layers), reduction

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        for pair in paired_maps(student, teacher, self.layers):
            pool_to_smaller(*pair)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        gaps = torch.stack([at(s, t, self.p) for s, t in paired_maps(student, teacher, self.layers)])
        return gaps.sum() if self.reduction == "sum" else gaps.mean()
