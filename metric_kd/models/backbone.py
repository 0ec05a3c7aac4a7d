"""Backbone: what every network gives before its embedding, and the registry of those we define."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from metric_kd.registry import Registry
from metric_kd.types import Output


class Pixels(NamedTuple):
    """How a backbone wants its input: (pixel * scale/255 - mean) / std, channels reversed where ``bgr``."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scale: float = 1.0
    bgr: bool = False


class Backbone(nn.Module):
    """Images in, stage maps and a pooled feature out.

    A subclass sets ``pooled_size``, ``input_size`` (px of a test crop), ``provides`` (fields of ``Output`` it can give)
    and, where it does not follow the data set's own mean and standard deviation, ``pixels``. layers: a paper's name of
    a layer -> path of the submodule whose output it is, before any activation; empty where no paper names them.
    """

    pooled_size: int
    input_size: int = 224
    pixels: Pixels | None = None
    provides: frozenset[str] = frozenset({"pooled"})
    layers: dict[str, str] = {}

    def start_classifier(self, classifier: nn.Linear) -> None:
        """Draw the first weights of a classifier of the pooled feature; PyTorch's own are kept by default."""

    def forward(self, images: Tensor, want: tuple[str, ...] = ("pooled",)) -> Output:
        """images: (N, 3, H, W) float, normalised. Gives ``pooled`` always, ``maps`` and ``preacts`` where wanted."""
        raise TypeError(f"{type(self).__name__} does not define forward(images, want).")


class Resolved(NamedTuple):
    """A built backbone. ``read(module, images, want)`` gives its Output; ``heads`` begin the keys of a weight file that
    belong to classifiers, which the module does not have."""

    module: nn.Module
    read: Callable[[nn.Module, Tensor, tuple[str, ...]], Output]
    pooled_size: int
    input_size: int
    pixels: Pixels | None
    provides: frozenset[str]
    heads: tuple[str, ...]


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone")
"""name -> factory(**options) of the backbones defined here; torchvision's names are resolved in ``models.resnet``."""
