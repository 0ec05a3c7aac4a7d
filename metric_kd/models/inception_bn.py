"""BN-Inception: the batch-normalised successor of GoogLeNet, 1024 pooled features."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.cifar import initialise, pool
from metric_kd.models.googlenet import CAFFE_PIXELS, halve
from metric_kd.types import Output


class Widths(NamedTuple):
    """One row of the paper's table: output channels of each branch; a block without ``one`` has stride 2."""

    one: int
    reduce3: int
    three: int
    reduce_double: int
    double: int
    pooling: str
    project: int

    @property
    def stride(self) -> int:
        return 1 if self.one else 2

    def outputs(self, inputs: int) -> int:
        return self.one + self.three + self.double + (self.project or inputs)


BLOCKS = {
    "3a": Widths(64, 64, 64, 64, 96, "average", 32),
    "3b": Widths(64, 64, 96, 64, 96, "average", 64),
    "3c": Widths(0, 128, 160, 64, 96, "max", 0),
    "4a": Widths(224, 64, 96, 96, 128, "average", 128),
    "4b": Widths(192, 96, 128, 96, 128, "average", 128),
    "4c": Widths(160, 128, 160, 128, 160, "average", 128),
    "4d": Widths(96, 128, 192, 160, 192, "average", 128),
    "4e": Widths(0, 128, 192, 192, 256, "max", 0),
    "5a": Widths(352, 192, 320, 160, 224, "average", 128),
    "5b": Widths(352, 192, 320, 192, 224, "max", 128),
}


@BACKBONES.register("inception_v1bn")
class InceptionBN(Backbone):
    """BN-Inception with the parameter names of the published file (``inception_3a_1x1``, ``inception_3a_1x1_bn``).

    Maps, at 224 px: after pool 1 (64 at 56), convolution 2 (192 at 56), inception 3b (320 at 28), 4d (608 at 14) and
    5b (1024 at 7), so that they line up with the stages of a ResNet. Ioffe and Szegedy, "Batch normalization", 2015,
    arXiv 1502.03167, figure 5. Deviations: the pool projections of 4c and 4d have 128 channels, as in the published
    weights, where the figure has 96; running statistics move by 0.1 a step, where common ports move them by 0.9
    (Caffe's number for the opposite convention).
    """

    pixels = CAFFE_PIXELS
    pooled_size = 1024
    provides = frozenset({"maps", "pooled"})

    def __init__(self) -> None:
        super().__init__()
        self._add("conv1_7x7_s2", 3, 64, 7, 2)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        self._add("conv2_3x3", 64, 192, 3)
        channels = 192
        for name, widths in BLOCKS.items():
            prefix = f"inception_{name}_"
            if widths.one:
                self._add(prefix + "1x1", channels, widths.one, 1)
            self._add(prefix + "3x3_reduce", channels, widths.reduce3, 1)
            self._add(prefix + "3x3", widths.reduce3, widths.three, 3, widths.stride)
            self._add(prefix + "double_3x3_reduce", channels, widths.reduce_double, 1)
            self._add(prefix + "double_3x3_1", widths.reduce_double, widths.double, 3)
            self._add(prefix + "double_3x3_2", widths.double, widths.double, 3, widths.stride)
            if widths.project:
                self._add(prefix + "pool_proj", channels, widths.project, 1)
            channels = widths.outputs(channels)
        initialise(self)

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))

    def _unit(self, name: str, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)))

    def _block(self, name: str, x: Tensor) -> Tensor:
        widths, prefix = BLOCKS[name], f"inception_{name}_"
        branches = [self._unit(prefix + "1x1", x)] if widths.one else []
        branches.append(self._unit(prefix + "3x3", self._unit(prefix + "3x3_reduce", x)))
        double = self._unit(prefix + "double_3x3_1", self._unit(prefix + "double_3x3_reduce", x))
        branches.append(self._unit(prefix + "double_3x3_2", double))
        if widths.stride == 2:
            if x.shape[-2] % 2 or x.shape[-1] % 2:
                raise UserError("inception_v1bn cannot take images of this size; choose multiples of 32 px.")
            return torch.cat([*branches, halve(x)], 1)
        pooled = F.avg_pool2d(x, 3, 1, 1) if widths.pooling == "average" else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*branches, self._unit(prefix + "pool_proj", pooled)], 1)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        stem = halve(self._unit("conv1_7x7_s2", images))
        x = self._unit("conv2_3x3", self._unit("conv2_3x3_reduce", stem))
        maps = [stem, x]
        x = halve(x)
        for name in BLOCKS:
            x = self._block(name, x)
            if name in ("3b", "4d", "5b"):
                maps.append(x)
        return Output(maps=tuple(maps) if "maps" in want else None, pooled=pool(x))
