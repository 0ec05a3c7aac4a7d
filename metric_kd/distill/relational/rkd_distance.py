"""RKD distance loss in closed form: the student keeps the teacher's pairwise distances, up to one common scale."""

from typing import Any

import torch
from torch import Tensor

from metric_kd.distances import Pairwise, full_precision, paired
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

TILE = 2**16
"""Pairs in work at a time on a CPU: 256 KiB in float32 stay in a core's second-level cache."""


def rkd_distance(student: Tensor | Pairwise, teacher: Tensor | Pairwise) -> Tensor:
    """Huber gap between pairwise distances, each network's divided by its mean.

    D_ij = |x_i - x_j|, mu = mean of D over i != j, loss = mean over all N^2 of
    Huber_1(D_ij(student) / mu(student) - D_ij(teacher) / mu(teacher)).

    student (N, D), teacher (N, E), any widths, not normalised here; half types are raised to float32. mu of the student
    carries gradient; none reaches the teacher. Coincident rows give no gradient. The gradient can be taken once. N < 2
    gives 0.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv 1904.05068, section 3.2. Deviation: mean over
    N^2, the zero diagonal included, where the paper sums over distinct pairs (as in the authors' code).
    """
    student, teacher = paired(student, teacher)
    if len(student) < 2:
        return student.x.sum() * 0.0
    with full_precision(student.x):
        target = teacher.distances.detach().to(student.x)
        return _DistanceGap.apply(student.squared_for_symmetric, student.distances.detach(), target)  # type: ignore[no-any-return, no-untyped-call]


@TERMS.register("rkd_distance")
class RKDDistance(Term):
    """:func:`rkd_distance` on the embeddings.

    Default weight 1, the RKD paper's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 1.0
    paper = "Relational Knowledge Distillation, 2019, arXiv 1904.05068"

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return rkd_distance(student.embedding, teacher.embedding)


class _DistanceGap(torch.autograd.Function):
    """The loss as a function of the squared distances; the gradient is ready when the value is."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor, distances: Tensor, target: Tensor) -> Tensor:
        loss, slope, scale = distance_gap(distances, target)
        ctx.save_for_backward(slope, scale)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        slope, scale = ctx.saved_tensors
        return slope * (grads[0] * scale), None, None


def distance_gap(distances: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, slope, scale), slope * scale = d loss / d squared distances, from the distances of both networks, (N, N).

    With x = D / mu, c = clamp(x - x(teacher), -1, 1) is the slope of the Huber function and c (gap - c/2) its value; mu
    depends on every distance, which takes kappa, the mean of c x over i != j, from every slope:

        d loss / d D_ij^2 = (c_ij - kappa) / (2 N^2 mu D_ij),   0 on the diagonal
    """
    n = len(distances)
    pairs = n * n - n  # off the diagonal no distance is zero: no mask, which would wait for the device
    over_mu, over_nu = pairs / distances.sum(), pairs / target.sum()
    tile = n if distances.is_cuda else min(n, max(1, TILE // n))
    first, second = distances.new_empty(tile * n), distances.new_empty(tile * n)
    slope = torch.empty_like(distances)
    huber, products = [], []
    for start in range(0, n, tile):
        rows = slice(start, min(start + tile, n))
        x, gap = (buffer[: (rows.stop - start) * n].view(-1, n) for buffer in (first, second))
        torch.mul(distances[rows], over_mu, out=x)
        torch.sub(x, torch.mul(target[rows], over_nu, out=gap), out=gap)
        c = torch.clamp(gap, -1, 1, out=slope[rows]).view(-1)
        products.append(c.dot(x.view(-1)))
        huber.append(c.dot(gap.view(-1)) - c.dot(c) / 2)
    kappa = torch.stack(products).sum() / pairs
    for start in range(0, n, tile):
        slope[start : start + tile].sub_(kappa).div_(distances[start : start + tile])
    slope.fill_diagonal_(0.0)
    return torch.stack(huber).sum() / n**2, slope, over_mu / (2 * n**2)
