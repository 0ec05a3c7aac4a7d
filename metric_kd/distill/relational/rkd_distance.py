"""RKD distance loss: the student keeps the teacher's pairwise distances, up to one common scale."""

from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from metric_kd.distances import Pairwise, full_precision, paired
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def rkd_distance(student: Tensor | Pairwise, teacher: Tensor | Pairwise) -> Tensor:
    """Huber gap between pairwise distances, each network's divided by its mean.

    D_ij = |x_i - x_j|, mu = mean of D over i != j, loss = mean over all N^2 of
    Huber_1(D_ij(student) / mu(student) - D_ij(teacher) / mu(teacher)).

    student (N, D), teacher (N, E), any widths, not normalised here; half types are raised to float32. mu of the student
    carries gradient; none reaches the teacher. Coincident rows give no gradient. N < 2 gives 0.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv 1904.05068, section 3.2. Deviation: mean over
    N^2, the zero diagonal included, where the paper sums over distinct pairs (as in the authors' code).
    """
    student, teacher = paired(student, teacher)
    n = len(student)
    if n < 2:
        return student.x.sum() * 0.0
    with full_precision(student.x):
        target = teacher.distances.detach().to(student.x)
        # Off the diagonal no distance is zero, so the mean needs no mask (a boolean index would wait for the device).
        pairs = n * n - n
        return smooth_l1_loss(student.distances / (student.distances.sum() / pairs), target / (target.sum() / pairs))


@TERMS.register("rkd_distance")
class RKDDistance(Term):
    """:func:`rkd_distance` on the embeddings.

    Default weight 1, the RKD paper's.
    """

    reads_teacher = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 1.0
    paper = "Relational Knowledge Distillation, 2019, arXiv 1904.05068"

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        return rkd_distance(student.embedding, teacher.embedding)
