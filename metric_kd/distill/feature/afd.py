"""Attentive feature distillation: channels are compared as directions, weighted by what the teacher sees in the image."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import LayerwiseTerm
from metric_kd.distill.layers import same_shape
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS
from metric_kd.models.cifar import initialise, pool
from metric_kd.types import Output


def afd(student: Tensor, teacher: Tensor, attention: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean over the images of the weighted squared gap between normalised channels.

    F^_c = F_c / (|F_c|_2 + eps) over the P = H W positions; loss = mean_n sum_c attention_nc mean_P (S^_nc - T^_nc)^2.
    Channels shorter than 1e-6 count as zero and get no gradient.

    student, teacher: (N, C, H, W), one shape; attention: (N, C), rows that sum to one, may carry a gradient; else
    ``UserError``. Half types are raised to float32; no gradient reaches the teacher.

    Wang, Gao, Zhao, Li, Dou, Xu: Pay Attention to Features, Transfer Learn Faster CNNs, 2020 (ICLR). Deviation: the
    attention of the KD Zoo, see :class:`AFD`.
    """
    same_shape("afd", student, teacher)
    if attention.shape != student.shape[:2]:
        raise UserError(
            f"afd needs one weight per image and channel, {tuple(student.shape[:2])}; got {tuple(attention.shape)}."
        )
    with full_precision(student):
        student = _directions(at_least_float32(student), eps)
        gaps = (student - _directions(teacher.detach().to(student), eps)).square().mean(2)
        return (attention.to(gaps) * gaps).sum(1).mean()


def _directions(maps: Tensor, eps: float, shortest: float = 1e-6) -> Tensor:
    """(N, C, H, W) to (N, C, P); dead channels are masked before and after: their slope would be 1 / eps."""
    rows = maps.flatten(2)
    short = torch.linalg.vector_norm(rows.detach(), dim=2, keepdim=True) < shortest
    safe = rows.masked_fill(short, 1.0)
    return (safe / (torch.linalg.vector_norm(safe, dim=2, keepdim=True) + eps)).masked_fill(short, 0.0)


@TERMS.register("afd")
class AFD(LayerwiseTerm):
    """Mean of :func:`afd` over stages, with a trained attention over the channels of each.

    attention = a / sum_c a, a = sigmoid(W2 relu(W1 g + b1) + b2) of g, the teacher's map averaged over positions;
    ``att_factor`` C hidden units. ``layers`` as in ``1/2/3``, the last three by default; the larger grid is averaged
    down to the smaller one, and a student whose width is not the teacher's goes through a trained 1x1 convolution with
    batch normalisation. Default weight 500: the KD Zoo's, whose attention this is; its author found the paper's unstable.
    The attention is trained by the loss that it weights, and may drift to easy channels. Raises ``UserError`` for an
    eps that is not positive and for an ``att_factor`` that leaves no hidden unit.
    """

    cost = "N C H W"
    default_weight = 500.0
    paper = "Pay Attention to Features, Transfer Learn Faster CNNs, 2020, ICLR"

    def __init__(self, att_factor: float = 1.0, eps: float = 1e-6, layers: str = ""):
        super().__init__(layers)
        if not eps > 0 or not att_factor > 0:
            raise UserError(f"afd needs att_factor > 0 and eps > 0; got {att_factor:g} and {eps:g}.")
        self.att_factor, self.eps = att_factor, eps
        self.attentions = nn.ModuleList()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        super().build(student, teacher, num_classes)
        self.attentions = nn.ModuleList(self._attention(t).to(s.device) for s, t in self.pairs(student, teacher))

    def compare(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        means = pool(teacher.detach().to(student))
        logits = at_least_float32(self.attentions[level](means[:, :, None, None])).flatten(1)
        # The sigmoid over its sum, also where every sigmoid would be zero.
        return afd(student, teacher, logsigmoid(logits).softmax(1), self.eps)

    def _attention(self, teacher: Tensor) -> nn.Module:
        channels = teacher.shape[1]
        hidden = int(self.att_factor * channels)
        if hidden < 1:
            raise UserError(
                f"afd with att_factor={self.att_factor:g} leaves no hidden unit for {channels} channels; choose more."
            )
        network = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))
        initialise(network)
        return network
