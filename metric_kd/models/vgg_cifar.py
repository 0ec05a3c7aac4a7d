"""VGG networks with batch normalisation for small images: five blocks of 3x3 convolutions."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.cifar import initialise, pool
from metric_kd.types import Output

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Depth -> convolutions in each block; 11 to 19 are the paper's configurations A, B, D and E."""


class CifarVGG(Backbone):
    """VGG of 8, 11, 13, 16 or 19 layers: five blocks, the largest of every 2x2 pixels between them, average pooling.

    Maps and preacts: the five blocks before their max pooling, after and before their last ReLU; block 0 stands for the
    stem. At 32 px 64, 128, 256, 512, 512 channels at 32, 16, 8, 4, 4 px: the last two share a grid. Where the shorter
    side is 64 px or more, block 3 is followed by a max pooling too, so that 64 px give 64, 32, 16, 8, 4.

    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014, arXiv 1409.1556.
    Deviations: batch normalisation; average pooling and one linear layer (the network's own) in place of the last max
    pooling and three linear layers; Kaiming normal weights over fan-out; depth 8, which the paper does not have.
    Raises UserError for images below 8 px.
    """

    input_size = 32
    pooled_size = WIDTHS[-1]
    provides = frozenset({"maps", "preacts", "pooled"})

    def __init__(self, depth: int):
        super().__init__()
        channels = 3
        for number, (outputs, convolutions) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True)):
            layers: list[nn.Module] = []
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        initialise(self)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        height, width = images.shape[2:]
        if min(height, width) < 8:
            raise UserError(f"a VGG cannot take images of {height}x{width} px; give at least 8x8.")
        poolings = 4 if min(height, width) >= 64 else 3
        x, maps, preacts = images, [], []
        for number, block in enumerate(self.children()):
            preact = block(x)
            x = F.relu(preact)
            maps.append(x)
            preacts.append(preact)
            if number < poolings:
                x = F.max_pool2d(x, 2)
        return Output(
            maps=tuple(maps) if "maps" in want else None,
            preacts=tuple(preacts) if "preacts" in want else None,
            pooled=pool(x),
        )


for _depth in CONVOLUTIONS:
    BACKBONES.register(f"vgg{_depth}_cifar")(partial(CifarVGG, _depth))
