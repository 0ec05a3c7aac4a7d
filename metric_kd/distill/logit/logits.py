"""Logit regression: the student's logits equal the teacher's."""

from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over N K of (student - teacher)^2.

    Logits (N, K) of both networks; half types are raised to float32; no gradient reaches the teacher. Raises
    ``UserError`` where the shapes differ.

    Ba, Caruana: Do Deep Nets Really Need to be Deep?, 2014, arXiv 1312.6184. Deviation: a mean over images and classes
    where the paper has half the squared norm (as in the KD Zoo).
    """
    check_same_classes(student, teacher)
    with full_precision(student):
        student = at_least_float32(student)
        return mse_loss(student, teacher.detach().to(student))


def check_same_classes(student: Tensor, teacher: Tensor) -> None:
    """``UserError`` unless both are (N, K)."""
    if student.ndim != 2 or student.shape != teacher.shape:
        raise UserError(
            "student and teacher must give logits (N, K) for the same images and classes; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}: train both on the same classes."
        )


def paired_logits(student: Output, teacher: Output | None) -> tuple[Tensor, Tensor]:
    """The logits of both networks; ``UserError`` where one gives none."""
    if student.logits is None or teacher is None or teacher.logits is None:
        owner = "teacher" if student.logits is not None else "student"
        raise UserError(f"the {owner} gives no logits; choose a classification {owner} or another method.")
    return student.logits, teacher.logits


@TERMS.register("logits")
class Logits(Term):
    """:func:`logits` of the two networks.

    Default weight 0.1, the KD Zoo's.
    """

    needs = ("logits",)
    reads_teacher = True
    family = "logit"
    cost = "N K"
    default_weight = 0.1
    paper = "Do Deep Nets Really Need to be Deep?, 2014, arXiv 1312.6184"

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        check_same_classes(*paired_logits(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return logits(*paired_logits(student, teacher))
