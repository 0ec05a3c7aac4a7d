"""Networks for images of 32 px against torchvision's, with the strides of ours, and against the paper's words."""

import copy

import pytest
import torch
from small_networks import built, close
from torch import nn
from torch.nn import functional as F


def by_position(source, target):
    """Copy all tensors of a module into another one that has the same ones in the same order."""
    ours, theirs = source.state_dict(), target.state_dict()
    assert [tuple(t.shape) for t in ours.values()] == [tuple(t.shape) for t in theirs.values()]
    target.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    return target.double().eval()


def ours_and_images(base, size):
    network = copy.deepcopy(built(base)).double()
    generator = torch.Generator().manual_seed(2)
    return network.base, torch.randn(1, 3, size, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("depth", [11, 16])
def test_vgg_at_64_px_is_torchvisions(depth):
    from torchvision import models

    base, images = ours_and_images(f"vgg{depth}_cifar", 64)
    oracle = by_position(base, models.get_model(f"vgg{depth}_bn", weights=None, init_weights=False).features)
    out = base(images, want=("maps", "pooled"))
    x, seen = images, []
    for layer in oracle:
        if isinstance(layer, nn.MaxPool2d):
            seen.append(x)
        x = layer(x)
    for ours, theirs in zip(out.maps, seen, strict=True):
        close(ours, theirs)


def test_resnet50_is_torchvisions_behind_another_stem():
    from torchvision import models

    base, images = ours_and_images("resnet50_cifar", 16)
    oracle = models.resnet50(weights=None)
    oracle.conv1, oracle.maxpool, oracle.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    oracle.load_state_dict(base.state_dict())  # names included
    close(base(images).pooled, oracle.double().eval()(images))


def test_mobilenet_is_torchvisions_with_other_strides():
    from torchvision.models.mobilenetv2 import MobileNetV2

    settings = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    oracle = MobileNetV2(width_mult=0.5, inverted_residual_setting=settings, round_nearest=1).features
    expand = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    oracle[1].conv = nn.Sequential(expand, *oracle[1].conv)  # the reference's first group expands too, by 1
    base, images = ours_and_images("mobilenet_v2_cifar", 32)
    by_position(base, oracle)
    out = base(images, want=("maps", "pooled"))
    for ours, layers in zip(out.maps, (1, 4, 7, 14, 18), strict=True):
        close(ours, oracle[:layers](images))
    close(out.pooled, oracle(images).mean((2, 3)))


def test_shufflenet_v2_is_torchvisions_behind_another_stem():
    from torchvision import models

    oracle = models.shufflenet_v2_x1_0(weights=None)
    oracle.conv1[0], oracle.maxpool, oracle.fc = nn.Conv2d(3, 24, 1, bias=False), nn.Identity(), nn.Identity()
    base, images = ours_and_images("shufflenet_v2_cifar", 32)
    by_position(base, oracle)
    out = base(images, want=("maps", "pooled"))
    x = images
    for ours, layer in zip(out.maps, (oracle.conv1, oracle.stage2, oracle.stage3, oracle.stage4), strict=True):
        x = layer(x)
        close(ours, x)
    close(out.pooled, oracle(images))


def grouped(layer, x, groups):
    """A grouped 1x1 convolution and its normalisation, one group after the other."""
    weight = layer[0].weight[:, :, 0, 0].chunk(groups)
    parts = x.chunk(groups, 1)
    x = torch.cat([torch.einsum("oc,nchw->nohw", w, part) for w, part in zip(weight, parts, strict=True)], 1)
    norm = layer[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def shuffled(x, groups):
    size = x.shape[1] // groups
    return x[:, [group * size + k for k in range(size) for group in range(groups)]]


def test_shufflenet_v1_is_that_of_the_paper():
    base, x = ours_and_images("shufflenet_v1_cifar", 16)
    out = base(x, want=("maps", "preacts", "pooled"))
    x = grouped(base.stem, x, 1).relu()
    close(out.maps[0], x)
    for stage, blocks in enumerate(base.stages, start=1):
        for number, block in enumerate(blocks):
            groups, stride = 1 if stage == 1 and number == 0 else 3, 1 if number else 2
            middle = shuffled(grouped(block.reduce, x, groups).relu(), groups)
            one_by_one = [
                F.conv2d(middle[:, c : c + 1], block.depthwise[0].weight[c : c + 1], stride=stride, padding=1)
                for c in range(middle.shape[1])
            ]
            new = grouped(block.expand, block.depthwise[1](torch.cat(one_by_one, 1)), 3)
            if number:
                preact = new + x
            else:
                ninths = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype) / 9
                preact = torch.cat([new, F.conv2d(x, ninths, stride=2, padding=1, groups=x.shape[1])], 1)
            x = preact.relu()
        close(out.preacts[stage], preact)
        close(out.maps[stage], x)
    close(out.pooled, x.mean((2, 3)))
