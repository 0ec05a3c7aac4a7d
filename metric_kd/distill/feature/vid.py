"""Variational information distillation: the student's maps say much about the teacher's, under a trained Gaussian."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import LayerwiseTerm
from metric_kd.distill.layers import same_shape
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS
from metric_kd.models.cifar import initialise
from metric_kd.types import Output


def vid(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian with a mean per element and a variance per channel.

    loss = mean over N C H W of (log v_c + (mean - t)^2 / v_c) / 2, without the constant log(2 pi) / 2; may be negative.

    mean (N, C, H, W): what the student's map predicts; teacher: the same shape; variance (C,), positive; else
    ``UserError``. Half types are raised to float32; no gradient reaches the teacher.

    Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, 2019,
    arXiv 1904.05835. Deviation: a mean where the paper sums over C H W (as in the usual code).
    """
    same_shape("vid", mean, teacher)
    if variance.shape != mean.shape[1:2]:
        raise UserError(f"vid needs one variance per channel, ({mean.shape[1]},); got {tuple(variance.shape)}.")
    with full_precision(mean):
        mean = at_least_float32(mean)
        variance = variance.to(mean)
        gaps = (mean - teacher.detach().to(mean)).square().mean((0, 2, 3))
        return 0.5 * (variance.log() + gaps / variance).mean()


@TERMS.register("vid")
class VID(LayerwiseTerm):
    """Mean of :func:`vid` over stages, each with a trained network for the mean and a trained variance per channel.

    mean = conv(relu(conv(relu(conv(S))))), 1x1 without bias, from C_s over ``mid_factor`` C_t channels, twice, to C_t;
    variance = softplus(alpha) + ``eps``, ``init_var`` at first. ``layers`` as in ``1/2/3``, the last three by default;
    the larger grid is averaged down to the smaller one. Default weight 1: the KD Zoo's. Deviation: no batch
    normalisation in the network for the mean (as in the Zoo). Raises ``UserError`` for init_var <= eps, for eps <= 0
    and for a ``mid_factor`` that leaves no channel.
    """

    cost = "N C C' H W"
    default_weight = 1.0
    paper = "Variational Information Distillation for Knowledge Transfer, 2019, arXiv 1904.05835"

    def __init__(self, init_var: float = 5.0, eps: float = 1e-6, mid_factor: float = 1.0, layers: str = ""):
        super().__init__(layers)
        if not (0 < eps < init_var < math.inf) or not (0 < mid_factor < math.inf):
            raise UserError(
                "vid needs 0 < eps < init_var and mid_factor > 0, all finite; "
                f"got eps={eps:g}, init_var={init_var:g} and mid_factor={mid_factor:g}."
            )
        self.init_var, self.eps, self.mid_factor = init_var, eps, mid_factor
        self.alphas = nn.ParameterList()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        super().build(student, teacher, num_classes)
        rest = self.init_var - self.eps
        alpha = rest + math.log(-math.expm1(-rest))  # softplus(alpha) = rest, also where exp(rest) would overflow
        self.alphas = nn.ParameterList(
            torch.full((t.shape[1],), alpha, device=s.device) for s, t in self.pairs(student, teacher)
        )

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        ours, theirs = student.shape[1], teacher.shape[1]
        middle = int(self.mid_factor * theirs)
        if middle < 1:
            raise UserError(
                f"vid with mid_factor={self.mid_factor:g} leaves no channel of the teacher's {theirs}; choose a larger one."
            )
        widths = ((ours, middle), (middle, middle), (middle, theirs))
        layers: list[nn.Module] = []
        for inputs, outputs in widths:
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU()]
        network = nn.Sequential(*layers[:-1])
        initialise(network)
        return network.to(student.device)

    def compare(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        return vid(student, teacher, softplus(self.alphas[level]) + self.eps)
