"""DarkRank: the student gives the teacher's nearest neighbours their order a high likelihood."""

import torch
from torch import Tensor

from metric_kd.distances import Pairwise, full_precision, paired, unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def dark_rank(
    student: Tensor | Pairwise,
    teacher: Tensor | Pairwise,
    alpha: float = 2.0,
    beta: float = 3.0,
    list_length: int = 4,
) -> Tensor:
    """Negative log-likelihood, under the student, of the order of every row's nearest neighbours in the teacher.

    s_ij = -alpha |x_i - x_j|^beta of the student; pi_1 .. pi_L are the L = ``list_length`` nearest rows of i in the
    teacher, itself left out; loss = -mean_i sum_l (s_i,pi_l - log sum_{m >= l} exp s_i,pi_m): Plackett-Luce over those
    L only.

    student (N, D), teacher (N, E); half types are raised to float32; no gradient reaches the teacher. A batch of N rows
    has lists of at most N - 1; N < 3 gives 0, since a list of one has one order.

    Chen, Wang, Zhang: DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer, 2017,
    arXiv 1707.01220 (the "hard" form). Deviation: as in the RKD authors' code the list holds the L nearest rows
    where the paper ranks the whole candidate set. Ties in the teacher are broken arbitrarily.
    """
    student, teacher = paired(student, teacher)
    length = min(list_length, len(student) - 1)
    if length < 2:
        return student.x.sum() * 0.0
    with full_precision(student.x), torch.no_grad():
        apart = teacher.squared.detach().clone().fill_diagonal_(float("inf"))
        nearest = apart.topk(length, dim=1, largest=False).indices
    with full_precision(student.x):
        scores = -alpha * student.squared.gather(1, nearest).pow(beta / 2)
        rest = scores.flip(1).logcumsumexp(1).flip(1)
        return (rest - scores).sum(1).mean()


@TERMS.register("dark_rank")
class DarkRank(Term):
    """:func:`dark_rank` on the embeddings, with ``normalise`` on their directions.

    Default weight 1, the RKD code's, for embeddings of length 1: for a classifier's pooled features, whose distances are
    cubed, take ``normalise=true`` or a weight of about 0.001. Raises ``UserError`` for parameters that are not positive.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 1.0
    paper = "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer, 2017, arXiv 1707.01220"

    def __init__(self, alpha: float = 2.0, beta: float = 3.0, list_length: int = 4, normalise: bool = False):
        super().__init__()
        if not alpha > 0 or not beta > 0 or list_length < 2:
            raise UserError(
                f"dark_rank needs alpha > 0, beta > 0 and list_length >= 2; got {alpha:g}, {beta:g} and {list_length}."
            )
        self.alpha, self.beta, self.list_length, self.normalise = alpha, beta, list_length, normalise

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        ours, theirs = student.embedding, teacher.embedding
        if self.normalise:
            ours, theirs = unit_rows(ours), unit_rows(theirs)
        return dark_rank(ours, theirs, self.alpha, self.beta, self.list_length)
