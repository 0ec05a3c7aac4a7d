"""Neuron selectivity transfer: the student's channels are active where the teacher's are, as two distributions."""

import torch
from torch import Tensor

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers, pool_to_smaller
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two maps, under the kernel (a . b)^2.

    f_c = channel c of one image over its H W positions, divided by its length; loss = mean_n (mean_ij (t_i . t_j)^2 +
    mean_ij (s_i . s_j)^2 - 2 mean_ij (s_i . t_j)^2).

    student (N, C, H, W), teacher (N, C', H', W'): any channels; the larger grid is averaged down to the smaller one
    first. Half types are raised to float32; no gradient reaches the teacher. Channels shorter than 1e-6 count as zero
    and get no gradient. Made of matrices (N, C, C), or (N, H W, H W) where those are smaller.

    Huang, Wang: Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv 1707.01219. No
    deviation: the polynomial kernel with d = 2 and c = 0, which the paper recommends.
    """
    with full_precision(student):
        student = at_least_float32(student)
        student, teacher = (_unit_channels(maps) for maps in pool_to_smaller(student, teacher.detach().to(student)))
        if student.shape[2] < min(student.shape[1], teacher.shape[1]):
            # sum_ij (a_i . b_j)^2 = <A^T A, B^T B>, so that the loss is one squared difference.
            return (_over_channels(student) - _over_channels(teacher)).square().sum((1, 2)).mean()
        return _kernel(teacher, teacher) + _kernel(student, student) - 2 * _kernel(student, teacher)


def _unit_channels(maps: Tensor) -> Tensor:
    n, channels = maps.shape[:2]
    return unit_rows(maps.reshape(n * channels, -1)).view(n, channels, -1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.mT).square().mean()


def _over_channels(a: Tensor) -> Tensor:
    return a.mT @ a / a.shape[1]


@TERMS.register("nst")
class NST(Term):
    """Mean of :func:`nst` over stages: ``layers`` as in ``2/3``, the last stage alone by default.

    Raises ``UserError`` for a stage whose smaller map has one position, on which the loss would be constant.

    Default weight 10, the KD Zoo's.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"
    cost = "N C C' H W"
    default_weight = 10.0
    paper = "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, arXiv 1707.01219"

    def __init__(self, layers: str = ""):
        super().__init__()
        self.layers = parse_layers(layers)

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        for pair in self._pairs(student, teacher):
            if pool_to_smaller(*pair)[0].shape[2:].numel() < 2:
                raise UserError(
                    "nst compares where channels are active, but a stage to compare has 1x1 maps; "
                    "choose earlier stages, as in nst:10,layers=2."
                )

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return torch.stack([nst(s, t) for s, t in self._pairs(student, teacher)]).mean()

    def _pairs(self, student: Output, teacher: Output | None) -> list[MapPair]:
        return paired_maps(student, teacher, self.layers, count=1)
