"""Sobolev training: the student's answer to a change of the image is the teacher's."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metric_kd.distances import full_precision, unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def sobolev(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Mean squared gap between normalised input gradients.

    g^_n = g_n / |g_n|_2 over all entries of an image; loss = mean over all entries of (g^(student) - g^(teacher))^2.
    Gradients shorter than 1e-8 count as zero and pass nothing on.

    student_gradient, teacher_gradient: (N, ...), one shape, else ``UserError``; see :func:`input_gradient`. Half types
    are raised to float32; no gradient reaches the teacher.

    Czarnecki, Osindero, Jaderberg, Swirszcz, Pascanu: Sobolev Training for Neural Networks, 2017, arXiv 1706.04859.
    Deviation: as in the KD Zoo the gradient of the true class's logit, where the paper projects the Jacobian to random
    directions (Srinivas, Fleuret, arXiv 1803.00443, takes the class of the largest output).
    """
    if student_gradient.shape != teacher_gradient.shape or student_gradient.ndim < 2:
        raise UserError(
            "sobolev compares gradients of the same images; got "
            f"{tuple(student_gradient.shape)} and {tuple(teacher_gradient.shape)}."
        )
    with full_precision(student_gradient):
        student = unit_rows(student_gradient.flatten(1), 1e-8)
        return mse_loss(student, unit_rows(teacher_gradient.detach().flatten(1).to(student), 1e-8))


def input_gradient(logits: Tensor, labels: Tensor, images: Tensor, create_graph: bool = False) -> Tensor:
    """d(sum_n logits[n, labels_n]) / d(images), of the shape of ``images``, from which the logits were computed.

    The graph of the logits is kept, for other terms; ``create_graph``: the gradient can be differentiated again.
    """
    chosen = logits.gather(1, labels[:, None]).sum()
    return torch.autograd.grad(chosen, images, retain_graph=True, create_graph=create_graph)[0]


@TERMS.register("sobolev")
class Sobolev(Term):
    """:func:`sobolev` of the gradients of the label's logit with respect to the pixels (0..255).

    The KD Zoo takes them with respect to the normalised image, whose channels weigh a little differently. Default
    weight: the KD Zoo's. Raises ``UserError`` where student and teacher see images of two sizes.

    Default weight 20, the KD Zoo's.
    """

    needs = ("logits",)
    reads_teacher = True
    reads_labels = True
    differentiates = True
    same_images = True
    family = "logit"
    cost = "N H W"
    default_weight = 20.0
    paper = "Sobolev Training for Neural Networks, 2017, arXiv 1706.04859"

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        if batch.teacher_images is not None:
            raise UserError(
                "sobolev compares gradients pixel by pixel, so student and teacher must see one size; give them the same "
                "input size or leave sobolev out."
            )
        with full_precision(student.logits):
            ours = input_gradient(student.logits, batch.labels, batch.images, create_graph=True)
            return sobolev(ours, input_gradient(teacher.logits, batch.labels, batch.images))
