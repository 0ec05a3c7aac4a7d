"""Probabilistic knowledge transfer: every image finds the others as likely as the teacher does."""

import torch
from torch import Tensor

from metric_kd.distances import Pairwise, full_precision, paired
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

SHORTEST = 1e-6
"""Rows shorter than this have no direction: cosine 0 with every row, and no gradient."""


def pkt(student: Tensor | Pairwise, teacher: Tensor | Pairwise, eps: float = 1e-6) -> Tensor:
    """Divergence between the neighbour probabilities that the two embeddings give.

    x^_i = x_i / (|x_i| + eps), K_ij = (x^_i . x^_j + 1) / 2, q_ij = K_ij / sum_j K_ij, the diagonal included; loss =
    mean over all N^2 of q_ij(teacher) log((q_ij(teacher) + eps) / (q_ij(student) + eps)).

    student (N, D), teacher (N, E), any widths; half types are raised to float32; no gradient reaches the teacher. N < 2
    gives 0. Raises ``UserError`` for an eps that is not positive.

    Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, arXiv 1803.10837.
    Deviations: the diagonal counts and the mean runs over N^2 (as in the KD Zoo, hence the large default weight);
    rows shorter than 1e-6 get no gradient, where the usual code gives NaN.
    """
    _check_eps(eps)
    student, teacher = paired(student, teacher)
    if len(student) < 2:
        return student.x.sum() * 0.0
    with full_precision(student.x):
        ours = _probabilities(student.x, eps)
        theirs = _probabilities(teacher.x.detach().to(student.x), eps)
        return (theirs * ((theirs + eps).log() - (ours + eps).log())).mean()


def _probabilities(x: Tensor, eps: float) -> Tensor:
    short = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) < SHORTEST
    safe = x.masked_fill(short, 1.0)
    rows = (safe / (torch.linalg.vector_norm(safe, dim=1, keepdim=True) + eps)).masked_fill(short, 0.0)
    kernel = ((rows @ rows.T + 1) / 2).clamp(min=0.0)  # opposite rows: rounding must not make it negative
    return kernel / kernel.sum(1, keepdim=True)


def _check_eps(eps: float) -> None:
    if not eps > 0:
        raise UserError(f"pkt needs eps above 0; got {eps:g}.")


@TERMS.register("pkt")
class PKT(Term):
    """:func:`pkt` on the embeddings. Raises ``UserError`` for an eps that is not positive.

    Default weight 10000, the KD Zoo's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 10000.0
    paper = "Learning Deep Representations with Probabilistic Knowledge Transfer, 2018, arXiv 1803.10837"

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        _check_eps(eps)
        self.eps = eps

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return pkt(student.embedding, teacher.embedding, self.eps)
