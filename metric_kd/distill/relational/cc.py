"""Correlation congruence: the student keeps the teacher's correlations between images, under a Gaussian kernel."""

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import Pairwise, full_precision, paired, unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def cc(student: Tensor | Pairwise, teacher: Tensor | Pairwise, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Mean squared gap between two kernel matrices: the Gaussian kernel of unit rows as a Taylor series.

    S_ij = cosine of rows i and j, K_ij = exp(-2 gamma) sum_{p = 0 .. order} (2 gamma)^p / p! S_ij^p; loss = mean over
    all N^2 of (K_ij(student) - K_ij(teacher))^2.

    student (N, D), teacher (N, E), any widths; half types are raised to float32; no gradient reaches the teacher. Rows
    shorter than 1e-6 have cosine 0 and no gradient. N < 2 gives 0. Raises ``UserError`` unless gamma > 0 and
    order >= 1.

    Peng et al.: Correlation Congruence for Knowledge Distillation, 2019, arXiv 1904.01802. Deviations: only the
    correlation term, without the paper's instance term and its sampler (as in the KD Zoo).
    """
    _check_kernel(gamma, order)
    student, teacher = paired(student, teacher)
    if len(student) < 2:
        return student.x.sum() * 0.0
    with full_precision(student.x):
        target = _kernel(teacher.x.detach().to(student.x), gamma, order)
        return mse_loss(_kernel(student.x, gamma, order), target)


def _kernel(x: Tensor, gamma: float, order: int) -> Tensor:
    rows = unit_rows(x)
    scaled = 2 * gamma * (rows @ rows.T)
    series = torch.ones_like(scaled)
    for p in range(order, 0, -1):  # Horner: 1 + x (1 + x/2 (1 + x/3 (..)))
        series = 1 + scaled / p * series
    return math.exp(-2 * gamma) * series


def _check_kernel(gamma: float, order: int) -> None:
    if not gamma > 0 or order < 1:
        raise UserError(f"cc needs gamma > 0 and order >= 1; got {gamma:g} and {order}.")


@TERMS.register("cc")
class CC(Term):
    """:func:`cc` on the embeddings. Raises ``UserError`` for options out of range.

    Default weight 100, the KD Zoo's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 100.0
    paper = "Correlation Congruence for Knowledge Distillation, 2019, arXiv 1904.01802"

    def __init__(self, gamma: float = 0.4, order: int = 2):
        super().__init__()
        _check_kernel(gamma, order)
        self.gamma, self.order = gamma, order

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return cc(student.embedding, teacher.embedding, self.gamma, self.order)
