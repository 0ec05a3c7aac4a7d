"""Networks for small images: exact parameter counts, shapes, and the pinned forward of the reference."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, Pixels, build_network

GOLDEN = Path(__file__).parents[1] / "golden" / "models.npz"


def count(module):
    return sum(p.numel() for p in module.parameters())


def classifier(base, classes=100, **options):
    return build_network(NetworkSpec(base, embedding_size=0, num_classes=classes, **options))


@pytest.mark.parametrize(
    ("base", "classes", "expected"),
    [
        ("resnet20", 10, 272_474),
        ("resnet20", 100, 278_324),
        ("resnet110", 10, 1_730_714),
        ("resnet110", 100, 1_736_564),
        ("resnet8", 100, 83_892),
        ("resnet14", 100, 181_108),
        ("resnet32", 100, 472_756),
        ("resnet44", 100, 667_188),
        ("resnet56", 100, 861_620),
        ("resnet8_x4", 100, 1_233_540),
        ("resnet32_x4", 100, 7_433_860),
        ("resnet14_x0.5", 100, 47_340),
        ("resnet20_x0.5", 100, 71_756),
        ("resnet20_x0.375", 100, 41_194),
        ("resnet20:width=0.5", 100, 71_756),
        ("wrn_16_1", 100, 180_916),
        ("wrn_40_1", 100, 569_780),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_2", 100, 2_255_156),
        ("resnet20:bias=true", 10, 273_258),
        ("resnet20_x0.5:bias=true", 10, 69_178),
        ("resnet14_x0.5:bias=true", 10, 44_650),
        ("resnet20_x0.375:bias=true", 10, 39_238),
    ],
)
def test_parameter_counts_are_the_published_ones(base, classes, expected):
    assert count(classifier(base, classes)) == expected


def golden_value(name, position, shape):
    i = np.arange(np.prod(shape), dtype=np.float64)
    if len(shape) == 4:
        value = np.sqrt(4 / (shape[0] * shape[2] * shape[3])) * np.sin(1 + 12.9898 * i + position)
    elif len(shape) == 2:
        value = 0.3 * np.sin(1 + 12.9898 * i + position)
    elif name.endswith("running_mean"):
        value = 0.05 * np.sin(2 * i + position)
    elif name.endswith("running_var"):
        value = 1 + 0.1 * np.cos(3 * i + position)
    elif name.endswith("bias"):
        value = 0.1 * np.cos(i + position)
    else:
        value = 1 + 0.1 * np.sin(i + position)
    return torch.from_numpy(value.reshape(shape))


def test_resnet20_forward_is_that_of_the_reference():
    golden = np.load(GOLDEN)
    identity = Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), scale=255.0)
    network = classifier("resnet20", 10, pixels=identity, l2normalize=False).double().eval()
    state = network.state_dict()
    filled = {}
    for position, name in enumerate(golden["names"].tolist()):
        ours = "base." + name.replace("res", "layer").replace(".ds.", ".downsample.")
        ours = ours.replace("base.fc.", "classifier.")
        filled[ours] = golden_value(name, position, tuple(state[ours].shape))
    missing = set(state) - set(filled)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    network.load_state_dict(filled, strict=False)

    out = network(torch.from_numpy(golden["images"]), want=("maps", "preacts", "pooled", "logits"))
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(out.pooled, torch.from_numpy(golden["feat"]), **close)
    torch.testing.assert_close(out.logits, torch.from_numpy(golden["logits"]), **close)
    torch.testing.assert_close(out.maps[3], torch.from_numpy(golden["rb3_post"]), **close)
    for stage in (1, 2, 3):
        mean = out.preacts[stage].mean((2, 3))
        torch.testing.assert_close(mean, torch.from_numpy(golden[f"rb{stage}_pre_mean"]), **close)
    assert out.preacts[0].abs().mean().item() == pytest.approx(golden["stem_pre_mean_abs"].item(), abs=1e-9)
    for preact, activated in zip(out.preacts, out.maps, strict=True):
        torch.testing.assert_close(preact.relu(), activated)


@pytest.mark.parametrize(
    ("base", "channels", "sides"),
    [
        ("resnet8", (16, 16, 32, 64), (32, 32, 16, 8)),
        ("resnet8_x2:stem_stride=2", (32, 32, 64, 128), (16, 16, 8, 4)),
        ("resnet8_x0.5", (8, 8, 16, 32), (32, 32, 16, 8)),
        ("resnet8_x4", (32, 64, 128, 256), (32, 32, 16, 8)),
        ("wrn_10_2", (16, 32, 64, 128), (32, 32, 16, 8)),
    ],
)
def test_maps_and_preacts_have_the_documented_shapes(base, channels, sides):
    network = build_network(NetworkSpec(base, embedding_size=5)).eval()
    out = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), want=("maps", "preacts", "pooled", "embedding"))
    shapes = [(1, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [tuple(m.shape) for m in out.maps] == shapes
    assert [tuple(m.shape) for m in out.preacts] == shapes
    assert out.pooled.shape == (1, channels[-1])
    assert out.embedding.shape == (1, 5)


def test_any_image_size_works():
    network = build_network(NetworkSpec("resnet8", embedding_size=4)).eval()
    assert network(torch.zeros(2, 3, 105, 41)).embedding.shape == (2, 4)


def test_wide_resnet_preacts_are_the_next_normalisation_of_the_maps_computed_once():
    base = build_network(NetworkSpec("wrn_16_1")).base
    before = base.block2[0].bn1.running_mean.clone()
    out = base(torch.randn(4, 3, 32, 32), want=("maps", "preacts"))
    for mapped, preact, norm in zip(
        out.maps, out.preacts, (base.block1[0].bn1, base.block2[0].bn1, base.block3[0].bn1, base.bn1), strict=True
    ):
        torch.testing.assert_close(preact, nn.functional.batch_norm(mapped, None, None, norm.weight, norm.bias, True))
    moved = 0.9 * before + 0.1 * out.maps[1].mean((0, 2, 3))
    torch.testing.assert_close(base.block2[0].bn1.running_mean, moved)


def test_initialisation_is_kaiming_over_fan_out():
    torch.manual_seed(0)
    base = build_network(NetworkSpec("resnet8_x4")).base
    weight = base.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert base.layer3[0].bn2.weight.eq(1).all()


@pytest.mark.parametrize("base", ["resnet8_x0.3", "resnet8:stem_stride=0", "wrn_17_2", "wrn_16_0"])
def test_impossible_sizes_are_refused(base):
    with pytest.raises(UserError):
        build_network(NetworkSpec(base))


def test_projection_is_the_strided_convolution():
    from torch.nn import functional as F

    from metric_kd.models.cifar import Projection

    torch.manual_seed(0)
    projection = Projection(8, 16, 2, bias=True).double()
    for size in (7, 8, 33):
        x = torch.randn(2, 8, size, size, dtype=torch.float64)
        expected = F.conv2d(x, projection.weight, projection.bias, stride=2)
        torch.testing.assert_close(projection(x), expected, rtol=1e-12, atol=1e-12)
    assert projection.stride == (1, 1), "the strided kernel must not be called"


def test_narrow_networks_survive_larger_channels_last_images():
    """PyTorch's strided 1x1 kernel kills the process here; so this runs in a process of its own."""
    code = (
        "import torch\n"
        "from metric_kd.models import NetworkSpec, build_network\n"
        "torch.set_num_threads(1)\n"
        "network = build_network(NetworkSpec('resnet8_x0.5', embedding_size=16)).train()\n"
        "for count in (4, 3, 4, 2) * 5:\n"
        "    images = torch.randint(0, 256, (count, 3, 96, 96), dtype=torch.uint8)\n"
        "    images = images.contiguous(memory_format=torch.channels_last)\n"
        "    network(images).embedding.square().sum().backward()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
