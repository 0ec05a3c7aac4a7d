"""Soft targets: the student's softened class probabilities follow the teacher's."""

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.logit.logits import check_same_classes, paired_logits
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def st(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 mean_n KL(softmax(teacher_n / T) || softmax(student_n / T)), with T the ``temperature``.

    Logits (N, K) of both networks; half types are raised to float32; no gradient reaches the teacher. Raises
    ``UserError`` where the shapes differ and for a temperature that is not positive.

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531. Deviation: the
    Kullback-Leibler divergence where the paper has the cross entropy; they differ by the teacher's entropy, a constant.
    """
    _check_temperature(temperature)
    check_same_classes(student, teacher)
    with full_precision(student):
        student = at_least_float32(student)
        target = log_softmax(teacher.detach().to(student) / temperature, dim=1)
        gap = kl_div(log_softmax(student / temperature, dim=1), target, reduction="batchmean", log_target=True)
        return gap * temperature**2


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"soft targets need a temperature above 0; got {temperature:g}.")


@TERMS.register("st")
class SoftTargets(Term):
    """:func:`st` of the two networks' logits. Raises ``UserError`` for a temperature that is not positive.

    Default weight 0.1, the KD Zoo's.
    """

    needs = ("logits",)
    reads_teacher = True
    family = "logit"
    cost = "N K"
    default_weight = 0.1
    paper = "Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531"

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        check_same_classes(*paired_logits(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return st(*paired_logits(student, teacher), self.temperature)
