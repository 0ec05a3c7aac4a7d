"""Deep mutual learning: two networks that train together imitate each other's class probabilities."""

from torch import Tensor

from metric_kd.distill.logit.logits import check_same_classes, paired_logits
from metric_kd.distill.logit.st import st
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def dml(student: Tensor, peer: Tensor, elementwise: bool = False) -> Tensor:
    """mean_n KL(softmax(peer_n) || softmax(student_n)): what one network learns from its peer.

    Logits (N, K) of both networks; half types are raised to float32; no gradient reaches the peer, which has this loss
    with the roles exchanged. Raises ``UserError`` where the shapes differ.

    Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, 2018, arXiv 1706.00384. Only the divergence: the cross entropy
    beside it is a term of its own. Deviation: where both networks step on the same outputs (as in the KD Zoo), the
    paper lets the second one see the first one's updated predictions. ``elementwise``: divided by K, the mean over all
    entries that the program of multi-granularity distillation (arXiv 2108.06681) takes.
    """
    gap = st(student, peer, temperature=1.0)
    return gap / student.shape[1] if elementwise else gap


@TERMS.register("dml")
class MutualLearning(Term):
    """:func:`dml` of the two networks' logits, the peer standing where other methods have the teacher.

    Default weight 1, the paper's and the KD Zoo's.
    """

    needs = ("logits",)
    reads_teacher = True
    family = "logit"
    cost = "N K"
    default_weight = 1.0
    paper = "Deep Mutual Learning, 2018, arXiv 1706.00384"

    def __init__(self, elementwise: bool = False):
        super().__init__()
        self.elementwise = elementwise

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        check_same_classes(*paired_logits(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return dml(*paired_logits(student, teacher), elementwise=self.elementwise)
