"""Backbones for large images: torchvision's by name, GoogLeNet with LRN, BN-Inception."""

import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, build_network, load_weights
from metric_kd.models.googlenet import normalise_response


def pixels_of(n, side):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("base", "inner", "pooled"),
    [("resnet18", "base.layer1.0.conv1.weight", 512), ("resnet50", "base.layer4.2.conv3.weight", 2048)],
)
def test_resnets_have_the_references_layout(base, inner, pooled):
    network = build_network(NetworkSpec(base, 64)).eval()
    state = network.state_dict()
    for name in ("base.conv1.weight", "base.bn1.running_mean", inner, "linear.weight", "linear.bias"):
        assert name in state
    assert not any(".fc." in name for name in state)
    with torch.no_grad():
        out = network(pixels_of(2, 64), want=("maps", "pooled", "embedding"))
    assert out.pooled.shape == (2, pooled) and out.embedding.shape == (2, 64)
    widen = pooled // 512
    assert [m.shape[1] for m in out.maps] == [64, *(widen * c for c in (64, 128, 256, 512))]
    assert [m.shape[2] for m in out.maps] == [16, 16, 8, 4, 2]
    torch.testing.assert_close(out.maps[-1].mean((2, 3)), out.pooled)
    plain = {name: value + 0.5 for name, value in state.items() if value.is_floating_point()}
    assert load_weights(network, plain, strict=True) == []
    assert torch.equal(network.base.conv1.weight, plain["base.conv1.weight"])


def test_vit_gives_tokens_as_maps():
    network = build_network(NetworkSpec("vit_b_16", 32)).eval()
    with torch.no_grad():
        out = network(pixels_of(2, 224), want=("maps", "pooled", "embedding"))
    assert [tuple(m.shape) for m in out.maps] == [(2, 768, 14, 14)] * 5
    assert out.pooled.shape == (2, 768) and out.embedding.shape == (2, 32)
    torch.testing.assert_close(out.embedding.norm(dim=1), torch.ones(2))


def test_vit_is_built_for_its_input_size():
    network = build_network(NetworkSpec("vit_b_32", 8, input_size=64)).eval()
    with torch.no_grad():
        assert network(pixels_of(1, 64), want=("maps",)).maps[0].shape == (1, 768, 2, 2)
    with pytest.raises(UserError, match="multiple of 16 px, not 100"):
        build_network(NetworkSpec("vit_b_16", input_size=100))


@pytest.mark.parametrize(
    ("base", "pooled", "maps"),
    [
        ("densenet121", 1024, (64, 256, 512, 1024, 1024)),
        ("mobilenet_v3_small", 1024, (16, 16, 24, 48, 576)),
        ("efficientnet_b0", 1280, (16, 24, 40, 112, 1280)),
        ("convnext_tiny", 768, (96, 96, 192, 384, 768)),
        ("swin_t", 768, (96, 96, 192, 384, 768)),
        ("vgg11", 4096, (128, 256, 512, 512, 512)),
        ("shufflenet_v2_x0_5", 1024, (24, 48, 96, 192)),
        ("squeezenet1_1", 512, (64, 64, 128, 256, 512)),
        ("regnet_x_400mf", 400, (32, 32, 64, 160, 400)),
    ],
)
def test_any_torchvision_classifier_becomes_a_backbone(base, pooled, maps):
    network = build_network(NetworkSpec(base, 8, input_size=64)).eval()
    with torch.no_grad():
        out = network(pixels_of(1, 64), want=("maps", "pooled", "embedding"))
        again = network(pixels_of(1, 64), want=("embedding",))
    assert out.pooled.shape == (1, pooled) and again.embedding.shape == (1, 8)
    assert tuple(m.shape[1] for m in out.maps) == maps
    sides = [m.shape[2] for m in out.maps]
    assert sides == sorted(sides, reverse=True) and sides[0] > sides[-1]


def test_the_removed_layer_read_what_is_pooled():
    from torchvision import models

    torch.manual_seed(0)
    whole = models.mobilenet_v3_small(weights=None).eval()
    network = build_network(NetworkSpec("mobilenet_v3_small", 0, l2normalize=False)).eval()
    ours = {f"base.{k}": v for k, v in whole.state_dict().items() if not k.startswith("classifier.3.")}
    load_weights(network, ours, strict=True)
    images = pixels_of(2, 64)
    with torch.no_grad():
        expected = whole(network.normalise(images))
        torch.testing.assert_close(whole.classifier[3](network(images).embedding), expected)


def test_a_size_that_is_too_small_is_one_sentence():
    with pytest.raises(UserError, match="alexnet cannot take images of 20 px"):
        build_network(NetworkSpec("alexnet", input_size=20))


@pytest.mark.parametrize(
    ("base", "parameters", "maps"),
    [
        ("googlenet", 6_998_552, (64, 192, 480, 832, 1024)),
        ("inception_v1bn", 11_295_240, (64, 192, 320, 608, 1024)),
    ],
)
def test_caffe_born_backbones(base, parameters, maps):
    network = build_network(NetworkSpec(base, 0, num_classes=1000)).eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.no_grad():
        out = network(pixels_of(1, 64), want=("maps", "pooled", "embedding"))
        assert network(pixels_of(1, 224), want=("maps",)).maps[-1].shape == (1, 1024, 7, 7)
    assert out.pooled.shape == (1, 1024)
    assert [tuple(m.shape[1:]) for m in out.maps] == list(zip(maps, (16, 16, 8, 4, 2), (16, 16, 8, 4, 2), strict=True))
    assert out.pooled.isfinite().all()


def test_the_references_layout_of_inception_v1bn_loads():
    source, target = (build_network(NetworkSpec("inception_v1bn", 4)) for _ in range(2))
    state = {name.replace("base.", "base.model."): value for name, value in source.state_dict().items()}
    state["base.model.last_linear.weight"] = torch.zeros(1000, 1024)
    assert load_weights(target, state, strict=True) == []
    assert torch.equal(target.base.inception_5b_1x1.weight, source.base.inception_5b_1x1.weight)


def test_inception_v1bn_refuses_sizes_that_do_not_halve():
    network = build_network(NetworkSpec("inception_v1bn")).eval()
    with pytest.raises(UserError, match="multiples of 32"):
        network(pixels_of(1, 200))


def test_local_response_normalisation_is_caffes():
    x = torch.randn(2, 7, 3, 3, dtype=torch.float64) * 50
    expected = torch.empty_like(x)
    for c in range(7):
        window = x[:, max(0, c - 2) : c + 3].square().sum(1)
        expected[:, c] = x[:, c] / (1 + 1e-4 / 5 * window) ** 0.75
    torch.testing.assert_close(normalise_response(x), expected)
    assert normalise_response(torch.full((1, 5, 1, 1), 300.0, dtype=torch.float16)).isfinite().all()
