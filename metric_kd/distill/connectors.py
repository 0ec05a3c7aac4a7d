"""Trained layers that give the student's features the teacher's width, where a method compares them element by element."""

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from metric_kd.distances import at_least_float32
from metric_kd.distill.layers import MapPair, paired_maps, paired_preacts, parse_layers, pool_to_smaller
from metric_kd.errors import UserError
from metric_kd.losses.term import Term
from metric_kd.models.cifar import initialise
from metric_kd.types import Batch, Output


class Norm(nn.BatchNorm2d):
    """Batch normalisation that takes the running statistics where a batch has one value per channel: one image (the
    last of an epoch, say) with a map of 1x1, which PyTorch refuses to train on.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) * x.shape[2] * x.shape[3] == 1:
            return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def connector(student: Tensor, teacher: Tensor, *, always: bool = False, norm: bool = True) -> nn.Module:
    """From the student's width to the teacher's, on the student's device; identity where they agree.

    Maps (N, C, H, W): 1x1 convolution without bias and, with ``norm``, batch normalisation, no activation; rows (N, D):
    a linear layer without bias. ``always``: a layer even where the widths agree. Grids are not changed: pool first
    (:func:`~metric_kd.distill.layers.pool_to_smaller`).
    """
    ours, theirs = student.shape[1], teacher.shape[1]
    if ours == theirs and not always:
        return nn.Identity()
    layer: nn.Module
    if student.ndim == 4:
        layer = nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), *([Norm(theirs)] if norm else []))
    else:
        layer = nn.Linear(ours, theirs, bias=False)
    initialise(layer)
    return layer.to(student.device)


def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """A convolution from the student's width and grid to the teacher's, batch normalisation, ReLU.

    Student grid twice the teacher's: 3x3 with stride 2; half of it: transposed 4x4 with stride 2; otherwise the valid
    convolution of 1 + H_s - H_t by 1 + W_s - W_t. Raises ``UserError`` where the student's grid is smaller, but not
    by half. As RepDistiller's ``ConvReg``; deviation: no bias in front of the batch normalisation, which removes it.
    """
    (ours, *grid), (theirs, *wanted) = student.shape[1:], teacher.shape[1:]
    layer: nn.Module
    if all(s == 2 * t for s, t in zip(grid, wanted, strict=True)):
        layer = nn.Conv2d(ours, theirs, 3, stride=2, padding=1, bias=False)
    elif all(2 * s == t for s, t in zip(grid, wanted, strict=True)):
        layer = nn.ConvTranspose2d(ours, theirs, 4, stride=2, padding=1, bias=False)
    elif all(s >= t for s, t in zip(grid, wanted, strict=True)):
        layer = nn.Conv2d(ours, theirs, (1 + grid[0] - wanted[0], 1 + grid[1] - wanted[1]), bias=False)
    else:
        raise UserError(
            f"no regressor leads from a grid of {grid[0]}x{grid[1]} to one of {wanted[0]}x{wanted[1]}; "
            "choose connector=linear, which averages the larger grid down."
        )
    layers = nn.Sequential(layer, Norm(theirs), nn.ReLU())
    initialise(layers)
    return layers.to(student.device)


class LayerwiseTerm(Term):
    """Mean of :meth:`compare` over stages, each pooled to the smaller grid, the student's through its own connector.

    ``layers`` as in ``1/2/3``, the last three stages by default. A subclass reads ``maps`` or ``preacts``, whichever
    it names in ``needs``.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"

    def __init__(self, layers: str = ""):
        super().__init__()
        self.layers = parse_layers(layers)
        self.connectors = nn.ModuleList()

    def connect(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """What the student's map of one stage goes through."""
        return connector(student, teacher)

    def compare(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of the ``level``-th of the compared stages; student: after its connector, not of a half type."""
        raise TypeError(f"{type(self).__name__} does not define compare(level, student, teacher).")

    def pairs(self, student: Output, teacher: Output | None) -> list[MapPair]:
        """(student map, teacher map) of every compared stage, on one grid."""
        paired = paired_preacts if "preacts" in self.needs else paired_maps
        return [pool_to_smaller(*pair) for pair in paired(student, teacher, self.layers)]

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        self.connectors = nn.ModuleList(self.connect(s, t) for s, t in self.pairs(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        levels = enumerate(zip(self.connectors, self.pairs(student, teacher), strict=True))
        # Raised before the connector, for networks in a half type; autocast lowers it again, and then it is raised after.
        losses = [self.compare(i, at_least_float32(layer(at_least_float32(s))), t) for i, (layer, (s, t)) in levels]
        return torch.stack(losses).mean()
