"""torchvision's VGG, AlexNet and ResNets with a head of three linear layers, whose layers the paper compares."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Backbone, Pixels
from metric_kd.models.cifar import initialise, pool
from metric_kd.types import Output

PLAIN = ("vgg11", "vgg16", "vgg19", "alexnet")
RESIDUAL = ("resnet18", "resnet50", "resnet101", "resnet152")
UNDERLYING = {f"{name}_fc": name for name in (*PLAIN, *RESIDUAL)}
"""Backbone -> the network of torchvision that its convolutional part comes from."""
ADDED = ("extra.", "fc1.", "fc2.")
"""Beginnings of the keys that weights of the underlying network do not have."""


class FullyConnected(Backbone):
    """What the two families share: ``fc1``, ``fc2`` and how weights begin.

    pooled is fc2 after its ReLU and, where the family has one there, its dropout, so that a network's ``classifier`` is
    the paper's fc3. width: units of fc1 and fc2, 0 for the paper's.

    Cheng, Rao, Chen and Zhang, "Explaining Knowledge Distillation by Quantifying the Knowledge", 2020,
    arXiv 2003.03622; the layers and how weights begin are those of its code. Kaiming normal over fan-out for
    convolutions, 1 and 0 for batch normalisation, N(0, 0.01^2) for fc1 to fc3, biases 0. Raises UserError for a width
    below 0, without torchvision, and for images that are too small.
    """

    pixels = Pixels()
    drop_before = False
    """Dropout before each of fc1 and fc2, as in AlexNet, instead of after their ReLU."""

    def _begin(self, inputs: int, width: int, usual: int) -> None:
        """Add the head, then draw all weights."""
        if width < 0:
            raise UserError(f"a width of {width} is not possible; choose 1 or more, or 0 for the paper's {usual}.")
        self.pooled_size = width or usual
        self.fc1 = nn.Linear(inputs, self.pooled_size)
        self.fc2 = nn.Linear(self.pooled_size, self.pooled_size)
        self.dropout1, self.dropout2 = nn.Dropout(), nn.Dropout()  # two: one may run before a layer, the other after
        initialise(self)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                self.start_classifier(part)
            elif isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()

    def start_classifier(self, classifier: nn.Linear) -> None:
        nn.init.normal_(classifier.weight, 0, 0.01)
        nn.init.zeros_(classifier.bias)

    def _head(self, features: Tensor) -> Tensor:
        for linear, dropout in ((self.fc1, self.dropout1), (self.fc2, self.dropout2)):
            if self.drop_before:
                features = F.relu(linear(dropout(features)))
            else:
                features = dropout(F.relu(linear(features)))
        return features


class PlainFC(FullyConnected):
    """VGG or AlexNet: torchvision's ``features`` and adaptive pooling, then fc1 and fc2 of 4096 units.

    layers: conv is the last convolution: 512 channels at 14 px of 224 for VGG, 256 at 13 px of 227 for AlexNet. Maps:
    what each max pooling reads and what the last one gives, the last five of these (AlexNet has four); of VGG they are
    those of torchvision's name. Dropout (0.5) follows the ReLU of fc1 and fc2 in VGG, and precedes both in AlexNet.
    Simonyan and Zisserman, 2014, arXiv 1409.1556; Krizhevsky, 2014, arXiv 1404.5997. VGG takes images from 32 px on,
    AlexNet from 63 px.
    """

    provides = frozenset({"maps", "pooled"})

    def __init__(self, name: str, *, width: int = 0):
        super().__init__()
        network, inputs = _torchvision(name)
        self.name = name
        self.features, self.avgpool = network.features, network.avgpool
        self.drop_before = name == "alexnet"
        self.input_size, self.smallest = (227, 63) if name == "alexnet" else (224, 32)
        last = max(i for i, part in enumerate(self.features) if isinstance(part, nn.Conv2d))
        self.features[last + 1].inplace = False  # so that whoever hooks the convolution reads it before its ReLU
        self.layers = {"conv": f"features.{last}", "fc1": "fc1", "fc2": "fc2"}
        poolings = [i for i, part in enumerate(self.features) if isinstance(part, nn.MaxPool2d)]
        self.stages = [*(i - 1 for i in poolings), poolings[-1]][-5:]
        self._begin(inputs, width, 4096)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        height, width = images.shape[2:]
        if min(height, width) < self.smallest:
            side = self.smallest
            raise UserError(f"{self.name} cannot take images of {height}x{width} px; give at least {side}x{side}.")
        x, kept = images, self.stages if "maps" in want else []
        maps = []
        for i, part in enumerate(self.features):
            x = part(x)
            if i in kept:
                maps.append(x)
        return Output(maps=tuple(maps) if kept else None, pooled=self._head(self.avgpool(x).flatten(1)))


class ResidualFC(FullyConnected):
    """ResNet: torchvision's stem and stages, two more 3x3 convolutions, global average pooling, then fc1 and fc2.

    ``extra``: twice convolution, batch normalisation and ReLU, at the width and size of ``layer4``. layers: conv is the
    second batch normalisation there: 2048 channels (ResNet18: 512) at 7 px of 224. fc1 and fc2 have 2048 units
    (ResNet18: 4096), each with ReLU and dropout. Maps: the stem after its max pooling, then ``layer1`` to ``layer4``.
    He et al., 2015, arXiv 1512.03385. What the source leaves open: dropout of 0.5 follows each ReLU, as in VGG; the two
    convolutions have no biases, which batch normalisation would cancel.
    """

    provides = frozenset({"maps", "pooled"})
    layers = {"conv": "extra.bn2", "fc1": "fc1", "fc2": "fc2"}

    def __init__(self, name: str, *, width: int = 0):
        super().__init__()
        network, channels = _torchvision(name)
        self.conv1, self.bn1, self.relu, self.maxpool = network.conv1, network.bn1, network.relu, network.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (network.get_submodule(f"layer{k}") for k in (1, 2, 3, 4))
        self.extra = nn.Sequential()
        for k in (1, 2):
            self.extra.add_module(f"conv{k}", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
            self.extra.add_module(f"bn{k}", nn.BatchNorm2d(channels))
            self.extra.add_module(f"relu{k}", nn.ReLU())
        self._begin(channels, width, 4096 if name == "resnet18" else 2048)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        kept = "maps" in want
        maps = [x] if kept else []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            if kept:
                maps.append(x)
        return Output(maps=tuple(maps) if kept else None, pooled=self._head(pool(self.extra(x))))


def _torchvision(name: str) -> tuple[Any, int]:
    """torchvision's network without its classifier, its weights still to be drawn; the classifier's inputs."""
    try:
        from torchvision import models
    except ImportError as error:
        raise UserError(
            f"backbone {name}_fc is built of torchvision's {name}, which cannot be imported ({error}); install torchvision."
        ) from None
    here = torch.empty(0).device
    with torch.device("meta"):  # the classifiers that are not kept have up to 124 million weights
        network: Any = models.get_model(name, weights=None)
    attribute = "fc" if hasattr(network, "fc") else "classifier"
    linear = next(part for part in getattr(network, attribute).modules() if isinstance(part, nn.Linear))
    setattr(network, attribute, nn.Identity())
    return network.to_empty(device=here), linear.in_features


for _name in PLAIN:
    BACKBONES.register(f"{_name}_fc")(partial(PlainFC, _name))
for _name in RESIDUAL:
    BACKBONES.register(f"{_name}_fc")(partial(ResidualFC, _name))
