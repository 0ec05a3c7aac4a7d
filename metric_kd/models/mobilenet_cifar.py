"""MobileNetV2 for small images: inverted residuals, at half width unless told otherwise."""

from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.cifar import pool
from metric_kd.types import Output

GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels at width 1, blocks, stride of the first one."""
TAPPED = (2, 3, 5, 7)
"""The groups (from 1) that end a stage: the last ones at their resolution, and the last of all."""


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias that pads to keep the grid, but for the stride, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the channels, 3x3 for each channel alone, 1x1 back; the last one without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        wide = expansion * inputs
        self.expand = conv_norm(inputs, wide)
        self.depthwise = conv_norm(wide, wide, 3, stride, groups=wide)
        self.project = conv_norm(wide, outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return x + out if self.adds else out


@BACKBONES.register("mobilenet_v2_cifar")
class CifarMobileNetV2(Backbone):
    """MobileNetV2 with a 3x3 stem of stride 2, seven groups of inverted residuals and 1280 pooled features.

    width: factor on all channels, rounded down, but for the 1280 where it is below 1; ``mobilenet_v2_cifar_x1`` is the
    full one. Maps: the stem and the groups 2, 3, 5 and 7; at 32 px and half width 16, 12, 16, 48, 160 channels at 16,
    16, 8, 4, 2 px. Preacts: the stem before its ReLU, and the groups' own maps: a group ends in a linear layer, so its
    map has no activation to be taken before, is negative as often as positive, and serves methods that look at signs.

    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", 2018, arXiv 1801.04381, table 2, ReLU6.
    Deviations: group 2 keeps the grid (stride 1), for small images; group 1 has an expanding layer too, of factor 1.
    The paper gives no initialisation: PyTorch's. Raises UserError for a width that leaves a group without channels.
    """

    input_size = 32
    provides = frozenset({"maps", "preacts", "pooled"})

    def __init__(self, *, width: float = 0.5):
        super().__init__()
        if not 1 / 16 <= width < float("inf"):
            raise UserError(f"a width of {width:g} is not possible for MobileNetV2; choose 0.0625 or more.")
        channels = int(32 * width)
        self.stem = conv_norm(3, channels, 3, 2)
        groups = []
        for expansion, unit, count, stride in GROUPS:
            blocks = []
            for block in range(count):
                blocks.append(InvertedResidual(channels, int(unit * width), 1 if block else stride, expansion))
                channels = int(unit * width)
            groups.append(nn.Sequential(*blocks))
        self.groups = nn.Sequential(*groups)
        self.pooled_size = int(1280 * max(width, 1))
        self.head = conv_norm(channels, self.pooled_size)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        preact = self.stem(images)
        x = F.relu6(preact)
        maps = [x]
        for number, group in enumerate(self.groups, start=1):
            x = group(x)
            if number in TAPPED:
                maps.append(x)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=(preact, *maps[1:]) if "preacts" in want else None,
            pooled=pool(F.relu6(self.head(x))),
        )
