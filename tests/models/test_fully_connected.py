"""VGG, AlexNet and ResNets with the paper's three linear layers: layers, weights, counts and where weights come from."""

import copy
import sys

import pytest
import torch
from small_networks import on_meta, pictures
from torch import nn
from torch.nn import functional as F

from metric_kd.cli.listing import main as list_main
from metric_kd.errors import UserError
from metric_kd.models import (
    BACKBONES,
    NetworkSpec,
    Pixels,
    Taps,
    build_network,
    check_base,
    default_pixels,
    load_pretrained,
    pretrained,
)
from metric_kd.models.pretrained import published
from metric_kd.models.resnet import torchvision_names

NAMES = ("vgg11", "vgg16", "vgg19", "alexnet", "resnet18", "resnet50", "resnet101", "resnet152")
LIGHT = ("vgg11_fc:width=16", "alexnet_fc:width=16", "resnet18_fc:width=16")
PARAMETERS = {
    "alexnet_fc": 57_053_004,
    "vgg16_fc": 134_309_708,
    "resnet50_fc": 107_430_988,
    # 11,176,512 below fc, two 3x3x512x512, two 2x512, 512x4096 + 4096, 4096x4096 + 4096, 4096x12 + 12
    "resnet18_fc": 11_176_512 + 2 * 2_359_296 + 2 * 1_024 + 2_101_248 + 16_781_312 + 49_164,
}
"""With 12 classes; the reference's were measured as 57.05 million (AlexNet) and 107.4 million (ResNet50)."""
TAPS = {
    # path of conv, its shape at the network's own test size, fc1, fc2
    "vgg11_fc": (224, "features.18", (512, 14, 14), 4096),
    "vgg16_fc": (224, "features.28", (512, 14, 14), 4096),
    "vgg19_fc": (224, "features.34", (512, 14, 14), 4096),
    "alexnet_fc": (227, "features.10", (256, 13, 13), 4096),
    "resnet18_fc": (224, "extra.bn2", (512, 7, 7), 4096),
    "resnet50_fc": (224, "extra.bn2", (2048, 7, 7), 2048),
    "resnet101_fc": (224, "extra.bn2", (2048, 7, 7), 2048),
    "resnet152_fc": (224, "extra.bn2", (2048, 7, 7), 2048),
}


def network_of(base, **options):
    torch.manual_seed(2)
    return build_network(NetworkSpec(base, **{"embedding_size": 0, "num_classes": 5, **options}))


def louder(network):
    """Larger weights in the head, so that what it computes is seen above rounding, and its dropout too."""
    with torch.no_grad():
        network.base.fc1.weight.mul_(10)
        network.base.fc2.weight.mul_(10)
    return network


def convolutional_state(name):
    """A file of torchvision's ``name`` with random weights: all but the classifier, of which the keys."""
    from torchvision import models

    with torch.device("meta"):
        whole = models.get_model(name, weights=None).state_dict()
    generator = torch.Generator().manual_seed(7)
    state = {}
    for key, value in whole.items():
        if key.startswith(("classifier.", "fc.")):
            state[key] = torch.zeros(1)
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(3)
        else:
            state[key] = torch.rand(value.shape, generator=generator)
    return state


@pytest.mark.parametrize("base", PARAMETERS)
def test_parameter_counts(base):
    assert sum(p.numel() for p in on_meta(base, num_classes=12).parameters()) == PARAMETERS[base]


@pytest.mark.parametrize("base", TAPS)
def test_layers_have_the_papers_shapes(base):
    size, conv, shape, units = TAPS[base]
    network = on_meta(base)
    assert network.spec.input_size == size == check_base(base) and network.pooled_size == units
    assert network.base.layers == {"conv": conv, "fc1": "fc1", "fc2": "fc2"}
    with Taps(network.base, list(network.base.layers.values())) as taps:
        out = network(torch.empty(2, 3, size, size, device="meta"), want=("logits", "pooled"))
    assert taps.values[conv].shape == (2, *shape)
    assert taps.values["fc1"].shape == taps.values["fc2"].shape == out.pooled.shape == (2, units)
    assert out.logits.shape == (2, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [224, 64])
def test_maps_are_those_of_torchvisions_name(name, size):
    images = torch.empty(2, 3, size, size, device="meta")
    ours = [tuple(m.shape) for m in on_meta(f"{name}_fc")(images, want=("maps",)).maps]
    if name == "alexnet":
        sides = {224: (55, 27, 13, 6), 64: (15, 7, 3, 1)}[size]
        assert ours == [(2, c, s, s) for c, s in zip((64, 192, 256, 256), sides, strict=True)]
    else:
        theirs = on_meta(name, input_size=size, num_classes=None)(images, want=("maps",)).maps
        assert ours == [tuple(m.shape) for m in theirs]


@pytest.mark.parametrize("base", LIGHT)
def test_taps_are_read_before_their_relu_and_feed_what_follows(base):
    """From each tap on, the rest of the network computed by hand gives what the network gives."""
    network = louder(network_of(base)).eval().requires_grad_(False)
    backbone, images = network.base, pictures(2, 64)
    seen = {}
    for name, path in backbone.layers.items():  # plain hooks: an in-place ReLU would show here
        backbone.get_submodule(path).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    out = network(images, want=("maps", "pooled", "logits"))
    assert all(value.min() < 0 < value.max() for value in seen.values())
    after = F.relu(seen["conv"])
    if base.startswith("resnet"):
        pooled = after.mean((2, 3))
    else:
        pooled = backbone.avgpool(F.max_pool2d(after, 3 if "alexnet" in base else 2, 2)).flatten(1)
        assert torch.equal(after, out.maps[-2])
    torch.testing.assert_close(backbone.fc1(pooled), seen["fc1"])
    torch.testing.assert_close(backbone.fc2(F.relu(seen["fc1"])), seen["fc2"])
    assert torch.equal(F.relu(seen["fc2"]), out.pooled)
    assert torch.equal(network.classifier(out.pooled), out.logits)


def test_the_residual_blocks_are_two_convolutions_after_layer4():
    network = network_of("resnet18_fc:width=16").eval().requires_grad_(False)
    extra = network.base.extra
    assert [type(m).__name__ for m in extra] == 2 * ["Conv2d", "BatchNorm2d", "ReLU"]
    assert all(m.bias is None for m in extra if isinstance(m, nn.Conv2d))
    with Taps(network.base, ["extra.bn2"]) as taps:
        out = network(pictures(2, 64), want=("maps",))
    x = F.relu(F.conv2d(out.maps[-1], extra.conv1.weight, padding=1) / (1 + 1e-5) ** 0.5)
    expected = F.conv2d(x, extra.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(taps.values["extra.bn2"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["vgg11_fc:width=256", "alexnet_fc:width=256", "resnet18_fc:width=256"])
def test_how_weights_begin(base):
    backbone = network_of(base).base
    assert all(value.isfinite().all() for value in backbone.state_dict().values())
    for part in backbone.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * part.kernel_size[0] * part.kernel_size[1]
            count = part.weight.numel()
            assert part.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=4 / count**0.5)
        elif isinstance(part, nn.Linear):
            assert part.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert abs(part.weight.mean().item()) < 5 * 0.01 / part.weight.numel() ** 0.5
        elif isinstance(part, nn.BatchNorm2d):
            assert (part.weight == 1).all() and (part.running_mean == 0).all() and (part.running_var == 1).all()
            assert part.num_batches_tracked == 0
        if getattr(part, "bias", None) is not None:
            assert not part.bias.any()
    again = network_of(base).base.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in backbone.state_dict().items()), "the seed decides"


@pytest.mark.parametrize("base", LIGHT)
def test_a_training_step_reaches_every_weight(base):
    network = louder(network_of(base, embedding_size=6)).train()
    out = network(pictures(4, 64), want=("maps", "embedding", "logits"))
    assert out.embedding.shape == (4, 6) and out.logits.shape == (4, 5)
    (F.cross_entropy(out.logits, torch.arange(4)) + out.embedding[:, 0].sum()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())


def test_dropout_stands_where_the_architecture_has_it_and_only_in_training():
    """In training the same image twice differs; the first layer that may differ tells where the dropout stands."""
    first = {"vgg11_fc:width=64": "fc2", "alexnet_fc:width=64": "fc1", "resnet18_fc:width=64": "fc2"}
    for base, noisy in first.items():
        network, images = louder(network_of(base)).eval().requires_grad_(False), pictures(2, 64)
        runs = {True: [], False: []}
        for training in (False, True):
            for dropout in (network.base.dropout1, network.base.dropout2):  # batch normalisation stays in eval mode
                dropout.train(training)
            for _ in range(2):
                with Taps(network.base, ["fc1", "fc2"]) as taps:
                    pooled = network(images, want=("pooled",)).pooled
                runs[training].append({**taps.values, "pooled": pooled})
        quiet, loud = runs[False], runs[True]
        assert all(torch.equal(quiet[0][k], quiet[1][k]) for k in quiet[0])
        differ = [k for k in ("fc1", "fc2", "pooled") if not torch.equal(loud[0][k], loud[1][k])]
        assert differ[0] == noisy, base
        zeros = (loud[0]["pooled"] == 0) & (loud[0]["fc2"] > 0)
        assert zeros.any().item() == ("alexnet" not in base), "AlexNet has no dropout after fc2"


@pytest.mark.parametrize("base", LIGHT)
def test_a_network_comes_back_from_its_description(base):
    network = network_of(base, embedding_size=6, input_size=64).eval()
    again = build_network(NetworkSpec.from_dict(network.spec.to_dict())).eval()
    again.load_state_dict(network.state_dict())
    assert again.spec == network.spec and again.base.layers == network.base.layers
    images = pictures(2, 64)
    assert torch.equal(network(images).embedding, again(images).embedding)
    assert torch.equal(copy.deepcopy(network)(images).embedding, again(images).embedding)


@pytest.mark.parametrize("name", ["vgg11", "alexnet", "resnet18"])
def test_a_file_of_torchvisions_network_gives_the_convolutional_part(name, tmp_path):
    state = convolutional_state(name)
    torch.save(state, tmp_path / "weights.pth")
    network = network_of(f"{name}_fc:width=8")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert load_pretrained(network, str(tmp_path / "weights.pth")).startswith("weights.pth (sha256 ")
    taken = 0
    for key, value in network.state_dict().items():
        inner = key.removeprefix("base.")
        own = not key.startswith("base.") or inner.startswith(("extra.", "fc1.", "fc2."))
        assert torch.equal(value, before[key] if own else state[inner]), key
        taken += not own
    assert taken == sum(not key.startswith(("classifier.", "fc.")) for key in state)


def test_the_head_stays_its_own_even_where_the_files_would_fit():
    """ImageNet's fc6 and fc7 have the shapes of fc1 and fc2, and are not taken."""
    from torchvision import models

    with torch.device("meta"):
        classifier = models.alexnet(weights=None).classifier
        own = build_network(NetworkSpec("alexnet_fc")).base
    assert classifier[1].weight.shape == own.fc1.weight.shape and classifier[4].weight.shape == own.fc2.weight.shape
    assert not any(key.startswith("classifier.") for key in own.state_dict())


@pytest.mark.parametrize("choice", ["auto", "true"])
def test_published_weights_are_those_of_the_underlying_network(choice, monkeypatch):
    fetched = []

    def fetch(source, cache):
        fetched.append(source.url)
        return convolutional_state("resnet18")

    monkeypatch.setattr(pretrained, "_fetch", fetch)
    network = network_of("resnet18_fc:width=8")
    assert load_pretrained(network, choice) == "torchvision resnet18 IMAGENET1K_V1, convolutional part"
    assert fetched == [published("resnet18").url]
    assert torch.equal(
        network.base.layer4[1].bn2.running_var, convolutional_state("resnet18")["layer4.1.bn2.running_var"]
    )
    assert load_pretrained(network, "false") == "random initialisation" and len(fetched) == 1


@pytest.mark.parametrize("name", NAMES)
def test_all_have_published_weights_and_their_pixels(name):
    whole, ours = published(name), published(f"{name}_fc")
    assert ours.url == whole.url and ours.checksum == whole.checksum
    assert default_pixels(f"{name}_fc:width=8") == Pixels() == BACKBONES[f"{name}_fc"].func.pixels


def test_the_backbone_of_a_whole_network_is_taken_with_its_head(tmp_path):
    source, target = network_of("resnet18_fc:width=8"), build_network(NetworkSpec("resnet18_fc:width=8", 3))
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    load_pretrained(target, str(tmp_path / "whole.pth"))
    own = target.base.state_dict()
    assert all(torch.equal(own[key], value) for key, value in source.base.state_dict().items())


def test_files_that_do_not_fit_change_nothing(tmp_path):
    network = network_of("resnet18_fc:width=8")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state, own = convolutional_state("resnet18"), network.base.state_dict()
    path = tmp_path / "weights.pth"
    for broken, sentence in (
        ({k: v for k, v in state.items() if k != "layer2.0.conv1.weight"}, "has no 'layer2.0.conv1.weight'"),
        ({**state, "fc1.weight": own["fc1.weight"]}, "has no 'extra.conv1.weight', which resnet18_fc needs"),
        ({**own, "fc1.weight": torch.zeros(9, 512)}, r"'fc1.weight' of shape \(9, 512\).*\(8, 512\)"),
        ({**state, "layer9.weight": torch.zeros(1)}, "'layer9.weight', which resnet18_fc does not have"),
        (convolutional_state("vgg11"), "has no 'conv1.weight'"),
    ):
        torch.save(broken, path)
        with pytest.raises(UserError, match=sentence):
            load_pretrained(network, str(path))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_sizes_and_widths_that_cannot_be():
    for base, smallest in (("vgg11_fc:width=8", 32), ("alexnet_fc:width=8", 63), ("resnet18_fc:width=8", 8)):
        network = on_meta(base, num_classes=3)
        out = network(torch.empty(2, 3, smallest, smallest + 5, device="meta"), want=("maps", "logits"))
        assert out.logits.shape == (2, 3)
        if smallest > 8:
            with pytest.raises(UserError, match=f"images of {smallest}x{smallest - 1} px; give at least {smallest}x"):
                network(torch.empty(2, 3, smallest, smallest - 1, device="meta"))
    with pytest.raises(UserError, match=r"width of -1 .* or 0 for the paper's 2048"):
        check_base("resnet50_fc:width=-1")
    with pytest.raises(UserError, match="takes a whole number, not '1.5'"):
        check_base("vgg11_fc:width=1.5")
    with pytest.raises(UserError, match="unknown backbone 'vgg11_fc_x2'"):  # a factor on what is a number of units
        check_base("vgg11_fc_x2")


def test_they_are_listed_and_refused_without_torchvision(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    torchvision_names.cache_clear()
    try:
        list_main(["backbones"])
        with pytest.raises(UserError, match="vgg11_fc is built of torchvision's vgg11, .*; install torchvision"):
            check_base("vgg11_fc")
        assert default_pixels("vgg11_fc") == Pixels()
    finally:
        torchvision_names.cache_clear()
    listed = capsys.readouterr().out.split()
    assert {f"{name}_fc" for name in NAMES} <= set(listed) and "vgg11" not in listed


def test_checking_a_name_draws_and_holds_nothing():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert check_base("vgg19_fc", 64) == 64
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.is_meta for p in on_meta("vgg19_fc").parameters())
    with torch.device("cpu"):
        assert not any(p.is_meta for p in network_of("alexnet_fc:width=8").parameters())
