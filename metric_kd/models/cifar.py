"""Residual networks for small images: ResNet of depth 6n+2 and wide ResNet of depth 6n+4, three stages each."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.types import Output


def initialise(module: nn.Module) -> None:
    """Kaiming normal over fan-out for convolutions, zero for their biases, 1 and 0 for batch normalisation."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def pool(maps: Tensor) -> Tensor:
    """Global average pooling: (N, C, H, W) to (N, C), at any size."""
    return F.adaptive_avg_pool2d(maps, 1).flatten(1)


class Projection(nn.Conv2d):
    """A 1x1 convolution of every ``stride``-th pixel: what a strided 1x1 convolution computes.

    PyTorch's own strided form (2.15, CPU) writes beyond its memory in the backward pass of channels_last maps of 64 px and
    more with fewer than 16 channels, and ends the process; picking the pixels first avoids that kernel.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, bias: bool):
        super().__init__(inputs, outputs, 1, bias=bias)
        self.step = stride

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution with batch normalisation where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, bias: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(Projection(inputs, outputs, stride, bias), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor, with_preact: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output, and with ``with_preact`` also the sum before its last ReLU."""
        shortcut = x if self.downsample is None else self.downsample(x)
        preact = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut
        return (F.relu(preact), preact) if with_preact else F.relu(preact)


class CifarResNet(Backbone):
    """ResNet-(6n+2) for 32-px images: a 3x3 stem, three stages of n basic blocks, global average pooling.

    width: factor on the 16; 16, 32, 64 channels of the plain net. Factor 4 widens the stages to 64, 128, 256 and the
    stem only to 32, as published with ``resnet8x4`` and ``resnet32x4``. stem_stride: 2 halves the maps of a larger
    image. bias: give the convolutions a bias (the Caffe nets of IRG have one).

    Maps and preacts: stem, stages 1 to 3. He et al., "Deep residual learning", 2015, arXiv 1512.03385, section 4.2;
    deviation: the shortcut of a widening block is a 1x1 convolution with batch normalisation (option B).
    Raises UserError for a width that gives no whole number of channels and for a stem stride below 1.
    """

    input_size = 32
    provides = frozenset({"maps", "preacts", "pooled"})

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, depth: int, *, width: float = 1.0, stem_stride: int = 1, bias: bool = False):
        super().__init__()
        unit = 16 * width
        if unit < 1 or unit != int(unit):
            raise UserError(f"a width of {width:g} gives {unit:g} channels; choose one that makes 16 times it whole.")
        if stem_stride < 1:
            raise UserError(f"stem_stride is {stem_stride}; choose 1 or more.")
        widths = [int(unit), int(2 * unit), int(4 * unit)]
        channels = 32 if width == 4 else widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, stem_stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, outputs in enumerate(widths, start=1):
            blocks = []
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, outputs, 2 if stage > 1 and block == 0 else 1, bias))
                channels = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.pooled_size = channels
        initialise(self)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        preact = self.bn1(self.conv1(images))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in (self.layer1, self.layer2, self.layer3):
            *inner, last = stage
            for block in inner:
                x = block(x)
            if "preacts" in want:
                x, preact = last(x, with_preact=True)
                preacts.append(preact)
            else:
                x = last(x)
            maps.append(x)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=tuple(preacts) if "preacts" in want else None,
            pooled=pool(x),
        )


class WideBlock(nn.Module):
    """Pre-activation block; where the width changes, the activated input feeds both branches."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = Projection(inputs, outputs, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor, with_preact: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The block's output, and with ``with_preact`` also its normalised input, before the ReLU."""
        preact = self.bn1(x)
        active = F.relu(preact)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out = self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut
        return (out, preact) if with_preact else out


class WideResNet(Backbone):
    """WRN-depth-widen for 32-px images: stem of 16, stages of 16, 32, 64 times ``widen`` channels, depth 6n+4.

    Maps: stem and stages 1 to 3 as the convolutions leave them; preacts: the same after the batch normalisation that
    follows (of the next stage, or the last one), before its ReLU. Zagoruyko and Komodakis, "Wide residual networks",
    2016, arXiv 1605.07146; no dropout. Raises UserError for a depth that is not 6n+4.
    """

    input_size = 32
    provides = frozenset({"maps", "preacts", "pooled"})

    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential

    def __init__(self, depth: int, widen: int, *, stem_stride: int = 1):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise UserError(
                f"wrn_{depth}_{widen} cannot be: choose a depth of 6n+4 (10, 16, 28, 40) and a factor above 0."
            )
        if stem_stride < 1:
            raise UserError(f"stem_stride is {stem_stride}; choose 1 or more.")
        channels = 16
        self.conv1 = nn.Conv2d(3, channels, 3, stem_stride, 1, bias=False)
        for stage in (1, 2, 3):
            outputs = 16 * widen * 2 ** (stage - 1)
            blocks = []
            for block in range((depth - 4) // 6):
                blocks.append(WideBlock(channels, outputs, 2 if stage > 1 and block == 0 else 1))
                channels = outputs
            self.add_module(f"block{stage}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(channels)
        self.pooled_size = channels
        initialise(self)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        x = self.conv1(images)
        maps, preacts = [x], []
        for stage in (self.block1, self.block2, self.block3):
            first, *rest = stage
            if "preacts" in want:
                x, preact = first(x, with_preact=True)
                preacts.append(preact)
            else:
                x = first(x)
            for block in rest:
                x = block(x)
            maps.append(x)
        last = self.bn1(x)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=(*preacts, last) if "preacts" in want else None,
            pooled=pool(F.relu(last)),
        )


for _depth in (8, 14, 20, 32, 44, 56, 110):
    BACKBONES.register(f"resnet{_depth}")(partial(CifarResNet, _depth))
for _depth, _widen in ((16, 1), (16, 2), (40, 1), (40, 2)):
    BACKBONES.register(f"wrn_{_depth}_{_widen}")(partial(WideResNet, _depth, _widen))
