"""Imitation: the student's feature equals the teacher's, number by number."""

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.models.layers import LAYER
from metric_kd.types import Batch, Output


def imitate(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of (student - teacher)^2, both before their activation.

    Two tensors of one shape; half types are raised to float32; no gradient reaches the teacher. Raises ``UserError``
    where the shapes differ.

    Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, 2020, arXiv 2003.03622.
    """
    if student.shape != teacher.shape:
        ours, theirs = ("x".join(map(str, x.shape[1:])) for x in (student, teacher))
        raise UserError(
            f"imitate compares features of one shape; the student's is {ours} and the teacher's {theirs}: choose layers of "
            "one size (teacher_layer), or a loss that trains a transform between them, as fitnet."
        )
    with full_precision(student):
        student = at_least_float32(student)
        return mse_loss(student, teacher.detach().to(student))


@TERMS.register("imitate")
class Imitate(Term):
    """:func:`imitate` of one layer, by its name (:mod:`metric_kd.models.layers`); default weight 1.

    layer: of the student, the embedding by default; teacher_layer: of the teacher, where it has another name there.
    Alone it is the paper's distillation, without labels: ``run_distill.py --imitate LAYER``, where the student's dropout
    rests as well. Here the student is in the mode in which it is trained, as with any loss.

    Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, 2020, arXiv 2003.03622.
    """

    needs: ClassVar[tuple[str, ...]] = (f"{LAYER}embedding",)
    reads_teacher = True
    family = "feature"
    cost = "N F"
    default_weight = 1.0
    paper = "Explaining Knowledge Distillation by Quantifying the Knowledge, 2020, arXiv 2003.03622"

    def __init__(self, layer: str = "embedding", teacher_layer: str = ""):
        super().__init__()
        self.layer, self.teacher_layer = layer, teacher_layer or layer
        self.needs = (f"{LAYER}{self.layer}",)  # type: ignore[misc]  # an option chooses among what the class could declare
        self.teacher_needs = (f"{LAYER}{self.teacher_layer}",)  # type: ignore[misc]

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        imitate(_read(student, self.layer), _read(teacher, self.teacher_layer))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return imitate(_read(student, self.layer), _read(teacher, self.teacher_layer))


def _read(output: Output | None, layer: str) -> Tensor:
    if output is None or output.taps is None or layer not in output.taps:
        raise UserError(
            f"imitate was not given layer {layer!r}; peers can imitate each other at one layer only, leave teacher_layer out."
        )
    return output.taps[layer]
