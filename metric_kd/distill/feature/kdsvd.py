"""KD-SVD: the student's leading singular vectors change from stage to stage as the teacher's do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.distill.connectors import connector
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers, pool_to_smaller
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

SPARE = 3
"""How many singular vectors beyond k the student offers: its order need not be the teacher's."""
GAP = 1e-3
"""Squared singular values that differ by less than this share of the larger one count as equal."""
FAINT = 1e-3
"""Singular values below this share of the largest count as zero; their vectors are noise."""
SHORTEST = 1e-6
"""A map whose largest singular value is not above this has no direction at all."""


def kdsvd(student: Sequence[Tensor], teacher: Sequence[Tensor], k: int = 1) -> Tensor:
    """Gap between the kernels that the leading singular vectors of consecutive stages form.

    A map is read as H W rows of C channels. t_l (C, k): its first k right singular vectors in the teacher, times the
    singular values sigma / |sigma|; s_l: of the student's first k + 3, for each of the teacher's the one with the
    largest |cosine|, turned to its side, times the same factors. R_l(v)_ij = exp(-(v_l,i - v_l-1,j)^2 / 8) for every
    two channels of consecutive stages and each of the k; loss = sum_l |R_l(s) - R_l(t)|^2 / N.

    student, teacher: two or more maps (N, C, H, W) each, of equal C in pairs; the larger grid is averaged down to the
    smaller one first. Half types are raised to float32, the decomposition is made in float64; no gradient reaches the
    teacher. Raises ``UserError`` for other shapes and for a k beyond the rank of a map.

    Lee, Kim, Song: Self-supervised Knowledge Distillation Using Singular Value Decomposition, 2018, arXiv 1807.06819.
    Deviations: the paper's feature maps only, without its training scheme (as in the usual code). The sign of the
    teacher's vectors, which that code leaves to LAPACK, is such that their entries sum to 0 or more. The gradient of a
    singular vector divides by differences of squared singular values: pairs closer than 1e-3 of the larger one are left
    out of it; vectors with a singular value below 1e-3 of the largest, and those of maps near zero, are zero.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise UserError(
            f"kdsvd compares consecutive stages; got {len(student)} and {len(teacher)} maps, give two or more of each."
        )
    with full_precision(student[0]):
        stages = [_aligned(ours, theirs, k) for ours, theirs in zip(student, teacher, strict=True)]
        gaps = [
            (_kernel(ours, ours_before) - _kernel(theirs, theirs_before)).square().sum()
            for (ours_before, theirs_before), (ours, theirs) in zip(stages, stages[1:], strict=False)
        ]
        return torch.stack(gaps).sum() / len(student[0])


def _aligned(student: Tensor, teacher: Tensor, k: int) -> MapPair:
    """(N, C, k) scaled vectors of both, the student's in the order and with the signs of the teacher's."""
    student = at_least_float32(student)
    student, teacher = pool_to_smaller(student, teacher.detach().to(student))
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"kdsvd compares maps of equal channels; got {student.shape[1]} and {teacher.shape[1]}: "
            "put a trained transform between them, as --loss kdsvd does."
        )
    channels, positions = student.shape[1], student.shape[2:].numel()
    rank = min(channels, positions)
    if not 1 <= k <= rank:
        raise UserError(
            f"maps of {channels} channels and {positions} positions serve kdsvd with k = 1 to {rank}; got k={k}."
        )
    theirs, sigma = _leading(teacher, k)
    theirs = _upright(theirs)
    offered, _ = _leading(student, min(k + SPARE, rank))
    cosines = offered.detach().mT @ theirs
    best = cosines.abs().argmax(1, keepdim=True)  # (N, 1, k)
    side = 1 - 2 * (cosines.gather(1, best) < 0).to(offered)
    ours = offered.gather(2, best.expand(-1, offered.shape[1], -1)) * side
    scale = unit_rows(sigma)[:, None]
    return ours * scale, theirs * scale


def _upright(vectors: Tensor) -> Tensor:
    return vectors * (1 - 2 * (vectors.sum(1, keepdim=True) < 0).to(vectors))


def _kernel(v: Tensor, before: Tensor) -> Tensor:
    return torch.exp(-(v[:, :, None] - before[:, None]).square() / 8)


def _leading(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, C, count) right singular vectors and (N, count) singular values, largest first."""
    vectors, sigma = _Leading.apply(maps.flatten(2).mT, count)  # type: ignore[no-untyped-call]
    return vectors, sigma


class _Leading(torch.autograd.Function):
    """(N, P, C) to the first right singular vectors, through the smaller of X^T X and X X^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows = x.double()
        wide = rows.shape[1] < rows.shape[2]
        gram = rows @ rows.mT if wide else rows.mT @ rows
        broken = ~gram.isfinite().all(2).all(1)[:, None, None]  # eigh would raise: keep NaN in the value instead
        squared, vectors = torch.linalg.eigh(gram.masked_fill(broken, 0.0))
        squared, vectors = squared.flip(1).clamp(min=0.0), vectors.flip(2)
        largest = squared[:, :1]
        faint = (squared <= FAINT**2 * largest) | (largest <= SHORTEST**2)
        if wide:
            vectors = (rows.mT @ vectors / squared.masked_fill(faint, 1.0).sqrt()[:, None]).masked_fill(
                faint[:, None], 0.0
            )
        ctx.save_for_backward(x, vectors, squared, faint)
        ctx.count = count
        leading = vectors[:, :, :count].masked_fill(faint[:, None, :count], 0.0).masked_fill(broken, float("nan"))
        sigma = squared[:, :count].sqrt()
        ctx.mark_non_differentiable(sigma)
        return leading.to(x.dtype), sigma.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """dv_j = sum_i v_i (v_i . dA v_j) / (s_j - s_i) + (rest) dA v_j / s_j, for A = X^T X and s = sigma^2.

        The rest is what the known v_i leave out: there sigma is zero (or faint), which only happens for H W < C.
        """
        x, vectors, squared, faint = ctx.saved_tensors
        with full_precision(x):
            rows, count = x.double(), ctx.count
            gradient = grads[0].double().masked_fill(faint[:, None, :count], 0.0)
            own, leading = squared[:, None, :count], vectors[:, :, :count]
            apart = own - squared[:, :, None]
            equal = apart.abs() <= GAP * torch.maximum(own, squared[:, :, None])
            inverse = apart.masked_fill(equal, 1.0).reciprocal().masked_fill(equal, 0.0)
            inside = vectors.mT @ gradient
            rest = (gradient - vectors @ inside) / own.masked_fill(faint[:, None, :count], 1.0)
            turned = vectors @ (inside * inverse) + rest
            return ((rows @ turned) @ leading.mT + (rows @ leading) @ turned.mT).to(x.dtype), None


@TERMS.register("kdsvd")
class KDSVD(Term):
    """:func:`kdsvd` over stages: ``layers`` as in ``2/3/4``, the last three by default.

    Where the channels of a stage differ, the student's go through a trained 1x1 convolution without bias. Raises
    ``UserError`` for fewer than two stages and for a k beyond the rank of a map.

    Default weight 1; neither the paper nor the KD Zoo gives one for this sum.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"
    cost = "N C^2 (H W + C)"
    default_weight = 1.0
    paper = "Self-supervised Knowledge Distillation Using Singular Value Decomposition, 2018, arXiv 1807.06819"

    def __init__(self, layers: str = "", k: int = 1):
        super().__init__()
        self.layers, self.k = parse_layers(layers), k
        self.connectors = nn.ModuleList()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        pairs = self._pairs(student, teacher)
        self.connectors = nn.ModuleList([connector(s, t, norm=False) for s, t in pairs])
        wanted = [t for _, t in pairs]
        kdsvd(wanted, wanted, self.k)  # the connected maps will have these shapes: refuses what cannot be served

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        pairs = self._pairs(student, teacher)
        mapped = [layer(at_least_float32(s)) for layer, (s, _) in zip(self.connectors, pairs, strict=True)]
        return kdsvd(mapped, [t for _, t in pairs], self.k)

    def _pairs(self, student: Output, teacher: Output | None) -> list[MapPair]:
        return [pool_to_smaller(*pair) for pair in paired_maps(student, teacher, self.layers)]
