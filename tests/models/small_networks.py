"""Networks for images of 32 px as several tests need them: without memory, or with statistics of their own."""

from functools import cache

import torch
from torch import nn

from metric_kd.models import NetworkSpec, build_network


@cache
def on_meta(base, **options):
    """Shapes only; do not change it."""
    with torch.device("meta"):
        return build_network(NetworkSpec(base, **{"embedding_size": 0, "num_classes": 100, **options})).eval()


@cache
def built(base):
    """A network in eval mode that normalises by what it saw, so that images matter in its depth; do not change it."""
    torch.manual_seed(0)
    network = build_network(NetworkSpec(base, embedding_size=6, num_classes=10)).requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.momentum = 1.0
    network.train()(pictures(4))
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def pictures(count, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def close(ours, theirs, tolerance=1e-9):
    scale = theirs.abs().max().clamp(min=1).item()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)
