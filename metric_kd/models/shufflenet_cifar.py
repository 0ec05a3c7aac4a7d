"""ShuffleNets for small images, versions 1 and 2: cheap layers see a part of the channels, and shuffles mix the parts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.cifar import pool
from metric_kd.models.mobilenet_cifar import conv_norm
from metric_kd.types import Output

STEM = 24
BLOCKS = (4, 8, 4)
"""Blocks of each stage, in both versions; the first one halves the grid."""
GROUPS = 3
"""Groups of the 1x1 convolutions of version 1."""


class GroupedBottleneck(nn.Module):
    """Version 1: grouped 1x1 convolution, shuffle, 3x3 for each channel alone, grouped 1x1, and a shortcut.

    The shortcut is added; where the grid is halved it is the averaged input, and gives channels of its own.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        new = outputs - inputs if stride == 2 else outputs
        middle = new // 4
        self.groups = 1 if inputs == STEM else GROUPS
        self.reduce = conv_norm(inputs, middle, groups=self.groups)
        self.depthwise = conv_norm(middle, middle, 3, stride, groups=middle)
        self.expand = conv_norm(middle, new, groups=GROUPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and what it is before its last ReLU."""
        out = F.channel_shuffle(F.relu(self.reduce(x)), self.groups)
        out = self.expand(self.depthwise(out))
        preact = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x
        return F.relu(preact), preact


class SplitBlock(nn.Module):
    """Version 2: one half of the channels is kept (where the grid is halved: both see all), then halves are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        entering = inputs if stride == 2 else half
        self.shortcut: nn.Sequential | None = None
        if stride == 2:
            self.shortcut = nn.Sequential(
                conv_norm(entering, entering, 3, stride, groups=entering), conv_norm(entering, half)
            )
        self.enter = conv_norm(entering, half)
        self.depthwise = conv_norm(half, half, 3, stride, groups=half)
        self.leave = conv_norm(half, half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and what it is before its last ReLU.

        A kept half comes out of a ReLU, so that another one would not change it.
        """
        kept, changed = x.chunk(2, 1) if self.shortcut is None else (self.shortcut(x), x)
        changed = self.leave(self.depthwise(F.relu(self.enter(changed))))
        preact = F.channel_shuffle(torch.cat([kept, changed], 1), 2)
        return F.relu(preact), preact


class CifarShuffleNet(Backbone):
    """What both versions share: a 1x1 stem of 24 channels and three stages, each of which halves the grid."""

    input_size = 32
    provides = frozenset({"maps", "preacts", "pooled"})
    block: type[nn.Module]
    widths: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        channels = STEM
        self.stem = conv_norm(3, STEM)
        stages = []
        for outputs, count in zip(self.widths, BLOCKS, strict=True):
            blocks = []
            for number in range(count):
                blocks.append(self.block(channels, outputs, 1 if number else 2))
                channels = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)

    def finish(self, x: Tensor) -> Tensor:
        """What is pooled, from the last map."""
        return x

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        preact = self.stem(images)
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in self.stages.children():
            for block in stage.children():
                x, preact = block(x)
            maps.append(x)
            preacts.append(preact)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=tuple(preacts) if "preacts" in want else None,
            pooled=pool(self.finish(x)),
        )


@BACKBONES.register("shufflenet_v1_cifar")
class CifarShuffleNetV1(CifarShuffleNet):
    """ShuffleNet 1x with three groups for 32-px images.

    Maps and preacts: stem and stages after and before their last ReLU; at 32 px 24, 240, 480, 960 channels at 32, 16, 8,
    4 px; pooled: the last map, averaged.

    Zhang, Zhou, Lin and Sun, "ShuffleNet: an extremely efficient convolutional neural network for mobile devices",
    2017, arXiv 1707.01083, table 1, g = 3. Deviations: the stem is a 1x1 convolution without stride or max pooling; a
    block that halves the grid has a quarter of its *new* channels in the middle, where the paper takes a quarter of all.
    The paper gives no initialisation: PyTorch's.
    """

    block = GroupedBottleneck
    widths = (240, 480, 960)
    pooled_size = 960


@BACKBONES.register("shufflenet_v2_cifar")
class CifarShuffleNetV2(CifarShuffleNet):
    """ShuffleNetV2 1x for 32-px images, with 1024 pooled features behind a last 1x1 convolution.

    Maps and preacts: stem and stages after and before their last ReLU; at 32 px 24, 116, 232, 464 channels at 32, 16, 8,
    4 px. Half of a stage's channels come from earlier blocks and are activated already: there the two are equal.

    Ma, Zhang, Zheng and Sun, "ShuffleNet V2: practical guidelines for efficient CNN architecture design", 2018,
    arXiv 1807.11164, table 5. Deviations: the stem is a 1x1 convolution without stride or max pooling. The paper gives
    no initialisation: PyTorch's.
    """

    block = SplitBlock
    widths = (116, 232, 464)
    pooled_size = 1024

    def __init__(self) -> None:
        super().__init__()
        self.head = conv_norm(self.widths[-1], self.pooled_size)

    def finish(self, x: Tensor) -> Tensor:
        return F.relu(self.head(x))
