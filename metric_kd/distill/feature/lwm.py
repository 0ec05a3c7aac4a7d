"""LwM: what speaks for an image's class lies, for the student, where it lies for the teacher."""

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers, pool_to_smaller
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

FORMS = ["grad_cam", "zoo"]


def lwm(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute gap between normalised attention maps.

    M^_n = M_n / |M_n|_2 over the P = H W positions; loss = mean over N P of |M^(student) - M^(teacher)|. Maps shorter
    than 1e-8 count as zero and pass nothing on.

    student (N, H, W), teacher (N, H', W'), see :func:`class_attention`; the larger grid is averaged down to the smaller
    one first. Half types are raised to float32; no gradient reaches the teacher. ``UserError`` for other shapes.

    Dhar, Singh, Peng, Wu, Chellappa: Learning without Memorizing, 2019, arXiv 1811.08051.
    """
    if student.ndim != 3 or teacher.ndim != 3:
        raise UserError(f"lwm compares attention (N, H, W); got {tuple(student.shape)} and {tuple(teacher.shape)}.")
    with full_precision(student):
        ours = at_least_float32(student)
        pair = pool_to_smaller(ours[:, None], teacher.detach().to(ours)[:, None])
        student, teacher = (unit_rows(x.flatten(1), 1e-8) for x in pair)
        return l1_loss(student, teacher)


def class_attention(
    logits: Tensor, labels: Tensor, maps: Tensor, form: str = "grad_cam", create_graph: bool = False
) -> Tensor:
    """(N, H, W) of relu(sum_c a_nc F_nc), a = mean over positions of G = d(sum_n logits[n, labels_n]) / d(maps).

    maps: (N, C, H, W), from which the logits were computed. form: ``grad_cam``, F = maps (Selvaraju et al.: Grad-CAM,
    2016, arXiv 1610.02391), or ``zoo``, F = G, as in the KD Zoo's code. At least float32. The graph of the logits is kept,
    for other terms; ``create_graph``: the gradient can be differentiated again. Raises ``UserError`` for maps that are
    not on the way to the logits.
    """
    chosen = logits.gather(1, labels[:, None]).sum()
    (slope,) = torch.autograd.grad(chosen, maps, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if slope is None:
        raise UserError(
            "lwm needs maps from which the logits are computed, not copies, as a transformer's are; choose convolutional "
            "networks or leave lwm out."
        )
    slope = at_least_float32(slope)
    seen = slope if form == "zoo" else at_least_float32(maps)
    return (slope.mean((2, 3), keepdim=True) * seen).sum(1).relu()


@TERMS.register("lwm")
class LwM(Term):
    """:func:`lwm` of :func:`class_attention` at one stage, ``layer`` as in ``2``; the last but one by default.

    Behind the last stage there is only an average, so that its gradients are the same everywhere. ``form``: ``grad_cam``,
    or ``zoo`` for the gradient in the activation's place. Default weight 0.4: the KD Zoo's. Raises ``UserError`` for an unknown
    form, more than one layer, and stages that a network does not have.
    """

    needs = ("maps", "logits")
    reads_teacher = True
    reads_labels = True
    differentiates = True
    family = "feature"
    cost = "N C H W"
    default_weight = 0.4
    paper = "Learning without Memorizing, 2019, arXiv 1811.08051"

    def __init__(self, layer: str = "", form: str = "grad_cam"):
        super().__init__()
        self.layers = parse_layers(layer)
        if len(self.layers) > 1:
            raise UserError(f"lwm reads one stage; got layer={layer!r}: choose one, as in layer=2.")
        if form not in FORMS:
            raise one_of("form of loss 'lwm':", form, FORMS)
        self.form = form

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        pool_to_smaller(*self._maps(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        ours, theirs = self._maps(student, teacher)
        with full_precision(student.logits):
            attention = class_attention(student.logits, batch.labels, ours, self.form, create_graph=True)
            return lwm(attention, class_attention(teacher.logits, batch.labels, theirs, self.form))

    def _maps(self, student: Output, teacher: Output | None) -> MapPair:
        return paired_maps(student, teacher, self.layers, count=2)[0]
