"""ResNet-50 for small images: four stages of bottleneck blocks behind a 3x3 stem."""

from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.cifar import Projection, initialise, pool
from metric_kd.types import Output


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, the last to four times ``middle`` channels, and a shortcut as in ``BasicBlock``."""

    def __init__(self, inputs: int, middle: int, stride: int):
        super().__init__()
        outputs = 4 * middle
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(Projection(inputs, outputs, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, and the sum before its last ReLU."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        preact = self.bn3(self.conv3(x)) + shortcut
        return F.relu(preact), preact


@BACKBONES.register("resnet50_cifar")
class CifarResNet50(Backbone):
    """ResNet-50 with a 3x3 stem of stride 1 and no max pooling; parameter names are torchvision's.

    Maps and preacts: stem and stages 1 to 4 after and before their last ReLU; at 32 px 64, 256, 512, 1024, 2048
    channels at 32, 32, 16, 8, 4 px. He et al., "Deep residual learning for image recognition", 2015, arXiv 1512.03385,
    table 1. Deviations: the stem; a narrowing block has its stride in the 3x3 convolution (as torchvision has), the
    paper in the first 1x1.
    """

    input_size = 32
    pooled_size = 2048
    provides = frozenset({"maps", "preacts", "pooled"})

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self) -> None:
        super().__init__()
        channels = 64
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for stage, (middle, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(channels, middle, 2 if stage > 1 and block == 0 else 1))
                channels = 4 * middle
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        initialise(self)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        preact = self.bn1(self.conv1(images))
        x = F.relu(preact)
        maps, preacts = [x], [preact]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x, preact = block(x)
            maps.append(x)
            preacts.append(preact)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=tuple(preacts) if "preacts" in want else None,
            pooled=pool(x),
        )
