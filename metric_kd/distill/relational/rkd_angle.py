"""RKD angle loss in closed form: no N x N x D tensor, no saved N x N x N tensor, gradient in the forward pass."""

from typing import Any

import torch
from torch import Tensor

from metric_kd import kernels
from metric_kd.distances import COINCIDENT, Pairwise, full_precision, paired
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

TILE = {"cpu": 2**17, "cuda": 2**23}
"""Triples in work at a time: 512 KiB in float32 stay in a core's second-level cache."""


def rkd_angle(student: Tensor | Pairwise, teacher: Tensor | Pairwise) -> Tensor:
    """Huber gap between the angles that all triplets of the batch form in the student and in the teacher.

    e_ij = (x_j - x_i) / |x_j - x_i|, psi_ijk = <e_ij, e_ik>, loss = mean over all N^3 (i, j, k) of
    Huber_1(psi_ijk(student) - psi_ijk(teacher)); entries with equal indices are zero and counted.

    student (N, D), teacher (N, E), any widths, not normalised here; half types are raised to float32. The gradient goes
    to the student only and can be taken once. N < 3 gives 0. Time is O(N^2 D + N^3), extra memory O(N^2).
    A compiled kernel does the work where there is one (see ``metric_kd.kernels``): the same formula to rounding.
    Squared distances are computed in float64 and then cast; in float32 the gradient is good to about 1e-7, and to 4e-4
    where two rows are a thousandth of the batch's spread apart.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv 1904.05068, section 3.2. Deviations: mean over
    N^3 where the paper sums over distinct triplets (as in the authors' code); rows of one network closer than 1e-6
    form no angle and give no gradient, where the authors' code divides by 1e-12 and the gradient explodes.
    """
    student, teacher = paired(student, teacher)
    if len(student) < 3:
        return student.x.sum() * 0.0
    with full_precision(student.x):
        target = teacher.squared.detach().to(student.x)
        return _AngleGap.apply(student.squared_for_symmetric, target)  # type: ignore[no-any-return, no-untyped-call]


@TERMS.register("rkd_angle")
class RKDAngle(Term):
    """:func:`rkd_angle` on the embeddings.

    Default weight 2, the RKD paper's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D + N^3"
    default_weight = 2.0
    paper = "Relational Knowledge Distillation, 2019, arXiv 1904.05068"

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return rkd_angle(student.embedding, teacher.embedding)


class _AngleGap(torch.autograd.Function):
    """The loss as a function of two matrices of squared distances; the gradient is ready when the value is."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        loss, gradient = angle_gap(student, teacher, want_gradient=ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def angle_gap(u: Tensor, v: Tensor, want_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """(loss, d loss / d u as a symmetric matrix) from squared distances of the student (u) and the teacher (v), (N, N).

    By a compiled kernel where there is one for such tensors, else by :func:`angle_gap_in_tiles`.
    """
    fused = kernels.angle_gap(u, v)
    if fused is None:
        return angle_gap_in_tiles(u, v, want_gradient)
    loss, gradient = fused
    return loss, gradient if want_gradient else None


def angle_gap_in_tiles(u: Tensor, v: Tensor, want_gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """:func:`angle_gap` by PyTorch alone, and the formulas of every kernel.

    With rho = 1/sqrt(u), 0 for coincident rows (and r, the same of v), the law of cosines gives the angle without D:

        A_ijk = (u_ij + u_ik - u_jk) rho_ij rho_ik / 2

    For d = A - A(teacher), c = clamp(d, -1, 1) is the slope of the Huber function and c (d - c/2) its value. The chain
    rule through u_ij, u_ik, u_jk and both rho needs three reductions of c:

        S_ij = rho_ij sum_k c rho_ik,   Q_ij = rho_ij^2 sum_k c A_ijk,   P_jk = sum_i c rho_ij rho_ik
        d loss / d u = (S + S^T - Q - Q^T - P) / 2 N^3

    Only one tile of triples exists at a time: b anchors i times m rows j times all k. There ``gap`` is 2 d and
    ``slope`` is 2 c.
    """
    n = u.shape[0]
    rho, r = _inverse_root(u), _inverse_root(v)
    tile = TILE.get(u.device.type, TILE["cpu"])
    m = min(n, max(1, tile // n))
    b = min(n, max(1, tile // (n * m)))
    first, second = u.new_empty(b * m * n), u.new_empty(b * m * n)
    products: list[Tensor] = []
    squares: list[Tensor] = []
    weights, excess, p = (torch.zeros_like(u) for _ in range(3))  # sum_k c rho_ik; sum_k c rho_ik (u_ik - u_jk); P
    for i in range(0, n, b):
        anchors = slice(i, min(i + b, n))
        for j in range(0, n, m):
            rows = slice(j, min(j + m, n))
            shape = (anchors.stop - anchors.start, rows.stop - rows.start, n)
            size = shape[0] * shape[1] * n
            gap, slope = first[:size].view(shape), second[:size].view(shape)
            torch.mul(_angle_tile(u, rho, anchors, rows, slope), rho[anchors, rows, None], out=gap)
            gap.addcmul_(_angle_tile(v, r, anchors, rows, slope), r[anchors, rows, None], value=-1)
            torch.clamp(gap, -2, 2, out=slope)
            products.append(torch.dot(slope.view(-1), gap.view(-1)))
            squares.append(torch.dot(slope.view(-1), slope.view(-1)))
            if not want_gradient:
                continue
            slope *= rho[anchors, None, :]
            torch.sum(slope, 2, out=weights[anchors, rows])
            torch.sub(u[anchors, None, :], u[rows], out=gap)
            torch.sum(gap.mul_(slope), 2, out=excess[anchors, rows])
            for k, anchor in enumerate(range(anchors.start, anchors.stop)):
                p[rows].addcmul_(slope[k], rho[anchor, rows, None])
    loss = ((torch.stack(products).double() - torch.stack(squares).double() / 2).sum() / (4 * n**3)).to(u.dtype)
    if not want_gradient:
        return loss, None
    # S - Q, since sum_k c A_ijk = rho_ij (u_ij weights_ij + excess_ij) / 2.
    s = rho * weights - 0.5 * rho**3 * (u * weights + excess)
    return loss, (s + s.T).sub_(p).fill_diagonal_(0.0).div_(4 * n**3)


def _angle_tile(u: Tensor, rho: Tensor, anchors: slice, rows: slice, out: Tensor) -> Tensor:
    """2 A_ijk / rho_ij of one tile; no matrix product, so that a lowered matmul precision does not reach it."""
    torch.sub(u[anchors, None, :], u[rows], out=out)
    return out.add_(u[anchors, rows, None]).mul_(rho[anchors, None, :])


def _inverse_root(squared: Tensor) -> Tensor:
    return squared.rsqrt().masked_fill_(squared <= COINCIDENT, 0.0)
