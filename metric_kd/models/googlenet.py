"""GoogLeNet as first published: local response normalisation, no batch normalisation, 1024 pooled features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.models.backbone import BACKBONES, Backbone, Pixels
from metric_kd.models.cifar import pool
from metric_kd.types import Output

CAFFE_PIXELS = Pixels(mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), scale=255.0, bgr=True)
"""Blue, green, red in 0..255 less a mean: what both Caffe-born backbones expect."""

INCEPTIONS: dict[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Table 1 of the paper: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""


class Inception(nn.ModuleDict):
    """Four parallel branches, concatenated; the keys are those of the published weight file."""

    def __init__(self, inputs: int, one: int, reduce3: int, three: int, reduce5: int, five: int, project: int):
        super().__init__(
            {
                "1x1": nn.Conv2d(inputs, one, 1),
                "3x3_reduce": nn.Conv2d(inputs, reduce3, 1),
                "3x3": nn.Conv2d(reduce3, three, 3, padding=1),
                "5x5_reduce": nn.Conv2d(inputs, reduce5, 1),
                "5x5": nn.Conv2d(reduce5, five, 5, padding=2),
                "pool_proj": nn.Conv2d(inputs, project, 1),
            }
        )
        self.outputs = one + three + five + project

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self["1x1"](x),
            self["3x3"](F.relu(self["3x3_reduce"](x))),
            self["5x5"](F.relu(self["5x5_reduce"](x))),
            self["pool_proj"](F.max_pool2d(x, 3, 1, 1)),
        )
        return F.relu(torch.cat(branches, 1))


def halve(x: Tensor) -> Tensor:
    """Caffe's pooling: 3x3 maximum, stride 2, sizes rounded up."""
    return F.max_pool2d(x, 3, 2, ceil_mode=True)


def normalise_response(x: Tensor) -> Tensor:
    """Local response normalisation over 5 channels, in float32 because it squares values of several hundred."""
    raised = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.local_response_norm(raised, 5, alpha=1e-4, beta=0.75, k=1.0).to(x.dtype)


@BACKBONES.register("googlenet")
class GoogLeNet(Backbone):
    """GoogLeNet without its auxiliary classifiers and dropout.

    Maps, at 224 px: after pool 1 (64 at 56), convolution 2 (192 at 56), inception 3b (480 at 28), 4e (832 at 14) and
    5b (1024 at 7), so that they line up with the stages of a ResNet. Szegedy et al., "Going deeper with convolutions",
    2015, arXiv 1409.4842. Deviations: global average pooling, so any size works; without published weights the
    convolutions begin Kaiming normal, since the paper does not give its initialisation.
    """

    pixels = CAFFE_PIXELS
    pooled_size = 1024
    provides = frozenset({"maps", "pooled"})

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.ModuleDict({"7x7_s2": nn.Conv2d(3, 64, 7, 2, 3)})
        self.conv2 = nn.ModuleDict({"3x3_reduce": nn.Conv2d(64, 64, 1), "3x3": nn.Conv2d(64, 192, 3, padding=1)})
        channels = 192
        for name, widths in INCEPTIONS.items():
            block = Inception(channels, *widths)
            self.add_module(f"inception_{name}", block)
            channels = block.outputs
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        stem = halve(F.relu(self.conv1["7x7_s2"](images)))
        x = F.relu(self.conv2["3x3_reduce"](normalise_response(stem)))
        x = F.relu(self.conv2["3x3"](x))
        maps = [stem, x]
        x = normalise_response(x)
        for name in INCEPTIONS:
            if name in ("3a", "4a", "5a"):
                x = halve(x)
            x = self.get_submodule(f"inception_{name}")(x)
            if name in ("3b", "4e", "5b"):
                maps.append(x)
        return Output(maps=tuple(maps) if "maps" in want else None, pooled=pool(x))
