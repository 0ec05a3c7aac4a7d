"""Layers by name: what they are, what they give, whose weights they have, and what runs up to them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, build_network
from metric_kd.models.layers import find_layer, reading, running_up_to, weight_of

SMALL = "resnet8_x0.25:stem_stride=2"
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def network(base=SMALL, embedding=8, classes=4):
    torch.manual_seed(0)
    return build_network(NetworkSpec(base, embedding, bool(embedding), 32, num_classes=classes)).eval()


@pytest.fixture(scope="module")
def vgg():
    return network("vgg11_fc:width=12", 0)


def test_fields_of_the_output():
    net = network()
    whole = net(IMAGES, want=("pooled", "embedding", "logits", "preacts", "maps"))
    for name in ("pooled", "embedding", "logits"):
        with reading(net, name) as read:
            assert torch.equal(read(IMAGES), getattr(whole, name))
    with reading(net, "conv") as read:
        assert torch.equal(read(IMAGES), whole.preacts[-1])
    with reading(network("mobilenet_v2", 0), "conv") as read:
        assert torch.equal(read(IMAGES), network("mobilenet_v2", 0)(IMAGES, want=("maps",)).maps[-1])


def test_the_papers_layers_are_read_before_their_relu(vgg):
    assert find_layer(vgg, "fc3") == ("fc3", "logits", "")
    features = vgg.base.features(vgg.normalise(IMAGES))
    fc1 = vgg.base.fc1(vgg.base.avgpool(features).flatten(1))
    fc2 = vgg.base.fc2(F.relu(fc1))
    for name, expected in {"fc1": fc1, "fc2": fc2, "fc3": vgg.classifier(F.relu(fc2))}.items():
        with reading(vgg, name) as read:
            feature = read(IMAGES)
        torch.testing.assert_close(feature, expected)
        assert (feature < 0).any() or name == "fc3"  # its few logits begin at any sign
    with reading(vgg, "conv") as read:
        assert read(IMAGES).shape == (3, 512, 2, 2) and (read(IMAGES) < 0).any()


def test_any_module_of_any_network():
    net = network()
    with reading(net, "linear") as read:
        torch.testing.assert_close(read(IMAGES), net.linear(net(IMAGES, want=("pooled",)).pooled))
    with reading(net, "classifier") as read:
        assert torch.equal(read(IMAGES), net(IMAGES, want=("logits",)).logits)
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3, requires_grad=True)
    with reading(plain, "0") as read:
        feature = read(x)
    assert torch.equal(feature, plain[0](x)) and plain[1].inplace
    feature.sum().backward()
    assert x.grad is not None and plain[0].weight.grad is not None and plain[2].weight.grad is None


def test_several_in_one_pass_beside_what_else_is_wanted(vgg):
    """Also what other terms read is what it is without: maps behind an in-place ReLU."""
    for net, path in ((network("squeezenet1_1", 0), "base.features.0"), (vgg, "base.features.16")):
        alone = net(IMAGES, want=("maps", "logits"))
        calls = []
        handle = net.base.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = net(IMAGES, want=("maps", "logits", "layer:pooled", f"layer:{path}"))
        handle.remove()
        assert len(calls) == 1 and list(output.taps) == ["pooled", path]
        assert output.pooled is None and output.embedding is None
        assert torch.equal(output.logits, alone.logits)
        assert all(torch.equal(one, other) for one, other in zip(output.maps, alone.maps, strict=True))
        assert (output.taps[path] < 0).any()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("fc1", "unknown layer 'fc1'; choose one of: conv, embedding, logits, pooled"),
        ("embeding", "did you mean 'embedding'"),
        ("base.layer9.0", r"did you mean 'base.layer\d.0'"),
        ("", "unknown layer"),
    ],
)
def test_unknown_names(name, sentence):
    with pytest.raises(UserError, match=sentence):
        find_layer(network(), name)


def test_names_that_this_network_does_not_have(vgg):
    with pytest.raises(UserError, match="did you mean 'fc\\d'"):
        find_layer(vgg, "fc4")
    with pytest.raises(UserError, match="tells no classes apart, so it has no layer 'logits'"):
        find_layer(network(classes=None), "logits")
    with pytest.raises(UserError, match="no layer 'fc3'"):
        find_layer(network("vgg11_fc:width=4", 0, None), "fc3")
    with pytest.raises(UserError, match="choose one of: 0, 1"):
        find_layer(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "pooled")
    with pytest.raises(UserError, match="unknown layer"):
        network()(IMAGES, want=("layer:fc1",))

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.left = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    with reading(Skipping(), "left") as read, pytest.raises(UserError, match="'left' is never called"):
        read(torch.randn(1, 3))


def test_weights(vgg):
    net = network()
    last = "layer3.0.conv2.weight"  # its shortcut comes later, but is no layer of its own
    found = {name: weight_of(net, name) for name in ("conv", "pooled", "embedding", "logits", "base.layer1.0.bn1")}
    assert found == {
        "conv": f"base.{last}",
        "pooled": f"base.{last}",
        "embedding": "linear.weight",
        "logits": "classifier.weight",
        "base.layer1.0.bn1": "base.layer1.0.conv1.weight",
    }
    assert weight_of(network(embedding=0), "embedding") == f"base.{last}"
    assert [weight_of(vgg, name) for name in ("conv", "fc1", "fc2", "fc3", "pooled")] == [
        "base.features.18.weight",
        "base.fc1.weight",
        "base.fc2.weight",
        "classifier.weight",
        "base.fc2.weight",
    ]
    assert weight_of(net, "base.layer3.0.downsample.0") == "base.layer3.0.downsample.0.weight", "unless it is asked for"
    resnet = network("resnet18_fc:width=4", 0)
    assert weight_of(resnet, "conv") == "base.extra.conv2.weight", "its batch normalisation has none"
    assert weight_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)), "1") == "0.weight"
    with pytest.raises(UserError, match="no weights come before"):
        weight_of(nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), "0")


class Branches(nn.Module):
    """Two branches after a stem; dropout directly behind the layer that is tapped, where it hands its input on."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
        self.one, self.drop_one = nn.Conv2d(4, 4, 1), nn.Dropout(0.5)
        self.two, self.norm_two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        two = self.norm_two(self.two(x))  # runs first, and is no part of what leads to ``one``
        return self.head((self.drop_one(self.one(x)) + two).mean((2, 3)))


def test_what_runs_up_to_a_layer():
    net = Branches().train()
    net.stem[1].eval()
    net.head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = running_up_to(net, "one", torch.randn(2, 3, 6, 6))
    assert found.parameters == {"stem.0.weight", "stem.0.bias", "one.weight", "one.bias"}
    assert found.modules == {"stem", "stem.0", "stem.1", "stem.2", "one"}
    assert running_up_to(net, "head", torch.randn(2, 3, 6, 6)).parameters == set(dict(net.named_parameters()))
    assert net.training and not net.stem[1].training and not net.head.weight.requires_grad, "left as it was"
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_what_runs_up_to_a_field():
    net = network()
    pooled = running_up_to(net, "pooled", IMAGES)
    assert pooled.parameters == {key for key, _ in net.named_parameters() if key.startswith("base.")}
    assert running_up_to(net, "embedding", IMAGES).parameters - pooled.parameters == {"linear.weight", "linear.bias"}
    norms = {path for path, m in net.base.named_modules(prefix="base") if isinstance(m, nn.BatchNorm2d)}
    assert norms <= pooled.modules and "linear" not in pooled.modules
    half = running_up_to(net, "base.layer2.0.bn1", IMAGES)
    assert "base.layer1.0.bn2" in half.modules and "base.layer2.0.bn2" not in half.modules
    assert not any("layer3" in key or "downsample" in key and "layer2" in key for key in half.parameters)
