"""Network: normalisation, what it gives, names and options, weights of the reference's layout."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, Pixels, backbone_names, build_network, check_base, load_weights, parse_base


def pixels_of(n=4, side=32, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_spec_round_trip_keeps_everything_in_plain_types(tmp_path):
    pixels = Pixels((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 1.0, True)
    spec = build_network(NetworkSpec("resnet8_x2:stem_stride=2", 16, False, None, pixels, 7)).spec
    assert (spec.input_size, spec.num_classes) == (32, 7)
    torch.save(spec.to_dict(), tmp_path / "spec.pth")
    assert NetworkSpec.from_dict(torch.load(tmp_path / "spec.pth", weights_only=True)) == spec
    assert NetworkSpec.from_dict({"base": "resnet8"}) == NetworkSpec("resnet8")
    with pytest.raises(UserError, match="did you mean 'embedding_size'"):
        NetworkSpec.from_dict({"base": "resnet8", "embeding_size": 3})
    with pytest.raises(UserError, match="no entry 'base'"):
        NetworkSpec.from_dict({})


def test_resolved_spec_has_the_backbones_defaults():
    assert build_network(NetworkSpec("resnet18")).spec.input_size == 224
    assert build_network(NetworkSpec("resnet18")).spec.pixels == Pixels()
    assert build_network(NetworkSpec("googlenet")).spec.pixels == Pixels((104, 117, 128), (1, 1, 1), 255.0, True)


@pytest.mark.parametrize("bgr", [False, True])
def test_normalisation_follows_its_formula(bgr):
    spec = NetworkSpec("resnet8", pixels=Pixels((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 2.0, bgr))
    network, images = build_network(spec), pixels_of()
    expected = torch.empty(images.shape, dtype=torch.float64)
    for channel in range(3):
        source = images[:, 2 - channel if bgr else channel].double()
        expected[:, channel] = (source * 2.0 / 255 - spec.pixels.mean[channel]) / spec.pixels.std[channel]
    torch.testing.assert_close(network.normalise(images).double(), expected, rtol=0, atol=2e-6)
    floats = images.float()
    torch.testing.assert_close(network.normalise(floats), network.normalise(images))
    assert torch.equal(floats, images.float()), "the caller's images are left alone"
    assert network.normalise(images.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_input_gradients_reach_the_images():
    network = build_network(NetworkSpec("resnet8"))
    images = pixels_of().float().requires_grad_()
    network(images).embedding.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_gives_only_what_is_wanted():
    network = build_network(NetworkSpec("resnet8", num_classes=3))
    out = network(pixels_of(), want=("logits", "maps"))
    assert out.logits.shape == (4, 3) and len(out.maps) == 4
    assert out.embedding is None and out.pooled is None and out.preacts is None
    assert network.provides == {"maps", "preacts", "pooled", "embedding", "logits"}


def test_asking_for_what_is_not_there_is_one_sentence():
    network = build_network(NetworkSpec("resnet8"))
    with pytest.raises(UserError, match="cannot give 'logits'.*num_classes"):
        network(pixels_of(), want=("logits",))
    with pytest.raises(UserError, match="cannot give 'preacts'"):
        build_network(NetworkSpec("resnet18"))(pixels_of(), want=("preacts",))
    with pytest.raises(UserError, match=r"\(N, 3, H, W\)"):
        network(pixels_of()[:, :1])


def test_embedding_is_linear_of_pooled_with_or_without_unit_length():
    torch.manual_seed(0)
    plain = build_network(NetworkSpec("resnet8", 16, l2normalize=False)).eval()
    unit = build_network(NetworkSpec("resnet8", 16)).eval()
    unit.load_state_dict(plain.state_dict())
    out = plain(pixels_of(), want=("pooled", "embedding"))
    torch.testing.assert_close(out.embedding, out.pooled @ plain.linear.weight.T + plain.linear.bias)
    torch.testing.assert_close(unit(pixels_of()).embedding, F.normalize(out.embedding))
    bare = build_network(NetworkSpec("resnet8", 0, l2normalize=False)).eval()
    assert bare.linear is None and bare.embedding_size == 64
    out = bare(pixels_of(), want=("pooled", "embedding"))
    assert torch.equal(out.pooled, out.embedding)


def test_autocast_gives_float32_unit_embeddings():
    network = build_network(NetworkSpec("resnet8", 16, num_classes=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(pixels_of(), want=("embedding", "maps", "pooled", "logits"))
    assert out.maps[-1].dtype == torch.bfloat16
    assert out.embedding.dtype == out.pooled.dtype == out.logits.dtype == torch.float32
    torch.testing.assert_close(out.embedding.norm(dim=1), torch.ones(4))


def test_one_image_and_channels_last_give_the_same_embedding():
    network = build_network(NetworkSpec("resnet8", 16)).eval()
    images = pixels_of()
    expected = network(images).embedding
    torch.testing.assert_close(network(images[:1]).embedding, expected[:1])
    network = network.to(memory_format=torch.channels_last)
    out = network(images.contiguous(memory_format=torch.channels_last)).embedding
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["resnet8", "mobilenet_v3_small"])
def test_networks_can_be_copied_and_pickled(base):
    network = build_network(NetworkSpec(base, 8)).eval()
    expected = network(pixels_of()).embedding
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(pixels_of()).embedding, expected)


def test_normalisation_is_not_in_the_state():
    state = build_network(NetworkSpec("resnet8", 8, num_classes=3)).state_dict()
    assert {name.partition(".")[0] for name in state} == {"base", "linear", "classifier"}


def test_names_with_widths_and_options():
    assert parse_base("resnet8_x2:stem_stride=2") == ("resnet8", {"width": 2.0, "stem_stride": 2})
    assert parse_base("resnet20:bias=true,width=0.5") == ("resnet20", {"bias": True, "width": 0.5})
    assert parse_base("wrn_28_10") == ("wrn_28_10", {})
    assert parse_base("shufflenet_v2_x0_5") == ("shufflenet_v2_x0_5", {})
    names = backbone_names()
    assert len(names) == len(set(names))
    for name in ("resnet8", "wrn_40_2", "googlenet", "inception_v1bn", "resnet50", "vit_b_16"):
        assert name in names


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("resnet81", "did you mean 'resnet8'"),
        ("resnet8:stem_strid=2", "did you mean 'stem_stride'"),
        ("resnet8:stem_stride=two", "takes a whole number, not 'two'"),
        ("resnet8:bias=maybe", "takes true or false"),
        ("resnet8:bias", "write bias=value"),
        ("resnet8:", "ends in a colon"),
        ("resnet8_x2:width=3", "given twice"),
        ("resnet18:width=2", "takes no options"),
        ("resnet18_x2", "unknown backbone"),
        ("wrn_16_2_x2", "unknown backbone"),
    ],
)
def test_wrong_names_and_options_are_one_sentence(base, sentence):
    with pytest.raises(UserError, match=sentence):
        build_network(NetworkSpec(base))
    with pytest.raises(UserError, match=sentence):
        check_base(base)


def test_checking_a_name_draws_no_random_numbers():
    state = torch.get_rng_state()
    for base in ("resnet8_x2:stem_stride=2", "wrn_28_10", "googlenet", "inception_v1bn", "vit_b_16", "swin_t"):
        check_base(base)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UserError, match="choose a depth of"):
        check_base("wrn_17_2")
    with pytest.raises(UserError, match="multiple of 16 px"):
        check_base("vit_b_16", 100)


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec("resnet8", embedding_size=-1),
        NetworkSpec("resnet8", num_classes=0),
        NetworkSpec("resnet8", input_size=0),
        NetworkSpec("resnet8", pixels=Pixels(std=(0.0, 1.0, 1.0))),
    ],
)
def test_impossible_specs_are_refused(spec):
    with pytest.raises(UserError):
        build_network(spec)


def test_strict_loading_is_all_or_nothing():
    source, target = build_network(NetworkSpec("resnet8", 8)), build_network(NetworkSpec("resnet8", 8))
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = source.state_dict()
    for broken, sentence in (
        ({k: v for k, v in state.items() if k != "base.bn1.weight"}, "have no 'base.bn1.weight'"),
        ({**state, "linear.weight": torch.zeros(9, 64)}, r"'linear.weight' of shape \(9, 64\).*\(8, 64\)"),
        ({**state, "base.extra": torch.zeros(1)}, "'base.extra', which this network does not have"),
        ({**state, "epoch": 3}, "'epoch' of the weights is no tensor"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_weights(target, broken, strict=True)
        assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    assert load_weights(target, {f"module.{k}": v for k, v in state.items()}, strict=True) == []
    assert all(torch.equal(state[k], v) for k, v in target.state_dict().items())


def test_old_files_without_batch_counters_load():
    source, target = build_network(NetworkSpec("resnet8", 8)), build_network(NetworkSpec("resnet8", 8))
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert load_weights(target, state, strict=True) == []
    assert torch.equal(target.base.conv1.weight, source.base.conv1.weight)


def test_loose_loading_takes_what_fits_and_names_the_rest():
    source = build_network(NetworkSpec("resnet8", 8, num_classes=3))
    target = build_network(NetworkSpec("resnet8", 4))
    left = load_weights(target, source.state_dict(), strict=False)
    assert sorted(left) == ["classifier.bias", "classifier.weight", "linear.bias", "linear.weight"]
    assert torch.equal(target.base.layer3[0].conv2.weight, source.base.layer3[0].conv2.weight)
    with pytest.raises(UserError, match="none of the weights fit"):
        load_weights(target, {"nothing": torch.zeros(2)}, strict=False)


def test_importing_models_imports_no_heavy_optional_package():
    code = (
        "import sys, metric_kd.models as m; m.build_network(m.NetworkSpec('resnet8'));"
        "assert not {'torchvision', 'h5py', 'faiss', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
