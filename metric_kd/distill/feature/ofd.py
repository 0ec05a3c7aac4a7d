"""Overhaul of feature distillation: pre-activations through a margin ReLU and a partial squared distance."""

import math

import torch
from torch import Tensor, nn

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import LayerwiseTerm, connector
from metric_kd.distill.layers import same_shape
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS


def ofd(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Mean squared gap to the teacher's margin ReLU, without the places where both are off.

    t' = max(t, margin_c); loss = mean over N C H W of (s - t')^2, counted as 0 where s <= t' <= 0.

    student, teacher: (N, C, H, W) before the activation, one shape; margin: (C,), negative, as :func:`ofd_margin` or
    :func:`bn_margin` gives it; else ``UserError``. Half types are raised to float32; no gradient reaches the teacher.

    Heo, Kim, Yun, Park, Kwak, Choi: A Comprehensive Overhaul of Feature Distillation, 2019, arXiv 1904.01866.
    Deviation: a mean over everything where the paper sums over C H W and halves the weight from stage to stage (as in
    the KD Zoo).
    """
    same_shape("ofd", student, teacher)
    if margin.shape != student.shape[1:2]:
        raise UserError(f"ofd needs one margin per channel, ({student.shape[1]},); got {tuple(margin.shape)}.")
    with full_precision(student):
        student = at_least_float32(student)
        target = torch.maximum(teacher.detach().to(student), margin.detach().to(student)[:, None, None])
        both_off = (student <= target) & (target <= 0)
        return (student - target).masked_fill(both_off, 0.0).square().mean()


def ofd_margin(teacher: Tensor) -> Tensor:
    """(C,) mean of the negative values in every channel of (N, C, H, W) pre-activations; 0 for a channel without any."""
    teacher = at_least_float32(teacher.detach())
    negative = (teacher < 0).sum((0, 2, 3))
    return teacher.clamp(max=0).sum((0, 2, 3)) / negative.clamp(min=1)


def bn_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The same as an expectation, where batch normalisation with this weight and bias gives the pre-activations.

    With x = bias + |weight| z, z standard normal: E[x | x < 0] = bias - |weight| phi(r) / Phi(-r), r = bias / |weight|;
    and -3 |weight| where x < 0 is rarer than 1 in 1000. weight, bias: (C,). The original's form; pre-activations that
    end in the sum with a shortcut need :func:`ofd_margin`.
    """
    weight, bias = at_least_float32(weight.detach()).abs(), at_least_float32(bias.detach())
    ratio = bias / weight.clamp(min=torch.finfo(weight.dtype).tiny)
    density = (-0.5 * ratio.square()).exp() / math.sqrt(2 * math.pi)
    below = torch.special.ndtr(-ratio)
    rare = below <= 1e-3
    return torch.where(rare, -3 * weight, bias - weight * density / below.masked_fill(rare, 1.0))


@TERMS.register("ofd")
class OFD(LayerwiseTerm):
    """Mean of :func:`ofd` over stages, the margins taken from the batch (:func:`ofd_margin`).

    ``layers`` as in ``1/2/3``, the last three by default; the larger grid is averaged down to the smaller one. The
    student always goes through a trained 1x1 convolution with batch normalisation. Default weight 0.5: the KD Zoo's.
    """

    needs = ("preacts",)
    cost = "N C C' H W"
    default_weight = 0.5
    paper = "A Comprehensive Overhaul of Feature Distillation, 2019, arXiv 1904.01866"

    def __init__(self, layers: str = ""):
        super().__init__(layers)

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return connector(student, teacher, always=True)

    def compare(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        return ofd(student, teacher, ofd_margin(teacher))
