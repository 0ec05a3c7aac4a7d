"""Networks: normalisation, a backbone, a linear embedding; by name, with published weights where there are some."""

from metric_kd.models import mobilenet_cifar, resnet50_cifar, shufflenet_cifar, vgg_cifar  # noqa: F401  (they fill BACKBONES)
from metric_kd.models.backbone import BACKBONES, Backbone, Pixels
from metric_kd.models.names import backbone_names, check_base, parse_base
from metric_kd.models.network import Network, NetworkSpec, build_network, load_weights
from metric_kd.models.pretrained import default_pixels, load_pretrained
from metric_kd.models.taps import Taps, layer_names

__all__ = [
    "BACKBONES",
    "Backbone",
    "Network",
    "NetworkSpec",
    "Pixels",
    "Taps",
    "backbone_names",
    "build_network",
    "check_base",
    "default_pixels",
    "layer_names",
    "load_pretrained",
    "load_weights",
    "parse_base",
]
