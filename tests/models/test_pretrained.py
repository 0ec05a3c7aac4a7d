"""Published weights: files, a loopback server, and what is said where they cannot be had."""

import functools
import hashlib
import http.server
import threading
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, Pixels, build_network, default_pixels, load_pretrained, pretrained
from metric_kd.models.pretrained import Published, published


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    """(folder, URL) of a web server on the loopback."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def squeezenet_state():
    from torchvision import models

    torch.manual_seed(1)
    return models.squeezenet1_1(weights=None).state_dict()


def network_of(base, **options):
    torch.manual_seed(2)
    return build_network(NetworkSpec(base, 8, **options))


def same(network, state, prefix=""):
    own = network.base.state_dict()
    return all(torch.equal(own[k], state[prefix + k]) for k in own if not k.endswith("num_batches_tracked"))


def test_published_weights_are_fetched_checked_and_cached(server, tmp_path, monkeypatch):
    folder, url = server
    state = squeezenet_state()
    torch.save(state, folder / "raw.pth")
    name = f"squeezenet1_1-{hashlib.sha256((folder / 'raw.pth').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "raw.pth").rename(folder / name)
    monkeypatch.setattr(pretrained, "published", lambda _: Published(f"{url}/{name}", "torchvision squeezenet1_1 V1"))
    cache = tmp_path / "cache"
    network = network_of("squeezenet1_1")
    assert load_pretrained(network, "auto", cache=str(cache)) == "torchvision squeezenet1_1 V1"
    assert same(network, state)

    (folder / name).unlink()
    network = network_of("squeezenet1_1")
    load_pretrained(network, "true", cache=str(cache))
    assert same(network, state), "the cached file is used"

    (cache / name).write_bytes(b"torn")
    with pytest.raises(
        UserError, match=rf"could not download {url}/{name} .*404.*--pretrained FILE.*--pretrained false"
    ):
        load_pretrained(network, "true", cache=str(cache))


def test_a_wrong_checksum_is_refused_and_not_kept(server, tmp_path, monkeypatch):
    folder, url = server
    (folder / "squeezenet1_1-deadbeef.pth").write_bytes(b"something else")
    monkeypatch.setattr(pretrained, "published", lambda _: Published(f"{url}/squeezenet1_1-deadbeef.pth", "x"))
    with pytest.raises(UserError, match="came with sha256 .* instead of deadbeef"):
        load_pretrained(network_of("squeezenet1_1"), "true", cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "published", lambda _: Published("http://127.0.0.1:9/a-12345678.pth", "x"))
    with pytest.raises(UserError, match="could not download http://127.0.0.1:9/a-12345678.pth") as caught:
        load_pretrained(network_of("squeezenet1_1"), "auto", cache=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_every_torchvision_weight_file_carries_its_checksum():
    assert published("resnet50").url.endswith("resnet50-0676ba61.pth")
    assert published("resnet50").label == "torchvision resnet50 IMAGENET1K_V1"
    assert published("resnet18").checksum == ("sha256", "f37072fd")
    assert published("inception_v1bn").checksum == ("sha256", "239d2248")
    assert published("googlenet").checksum == ("md5", "c7d7856bd1ab5cb02618b3f7f564e3c6")
    assert published("resnet20") is None and published("wrn_28_10") is None
    assert published("vit_b_16").checksum[0] == "sha256"


def test_choices_for_networks_without_published_weights():
    network = network_of("resnet8")
    before = network.base.conv1.weight.clone()
    assert load_pretrained(network, "auto") == load_pretrained(network, "false") == "random initialisation"
    assert torch.equal(before, network.base.conv1.weight)
    with pytest.raises(UserError, match="no published weights for resnet8"):
        load_pretrained(network, "true")
    with pytest.raises(UserError, match="no file; pass auto, true, false"):
        load_pretrained(network, "missing.pth")


def test_default_pixels():
    assert default_pixels("resnet50") == Pixels()
    assert default_pixels("googlenet") == default_pixels("inception_v1bn")
    assert default_pixels("googlenet").bgr
    assert default_pixels("resnet8_x2:stem_stride=2") is None and default_pixels("wrn_28_10") is None
    with pytest.raises(UserError):
        default_pixels("resnet81")


@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_torchvision_files(tmp_path, wrap):
    state = squeezenet_state()
    torch.save(wrap(state), tmp_path / "weights.pth")
    network = network_of("squeezenet1_1")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:12]
    assert load_pretrained(network, str(tmp_path / "weights.pth")) == f"weights.pth (sha256 {digest})"
    assert same(network, state)


def test_the_backbone_of_a_whole_network_can_be_taken(tmp_path):
    source, target = network_of("resnet8", num_classes=5), build_network(NetworkSpec("resnet8", 3))
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "whole.pth")
    linear = target.linear.weight.clone()
    load_pretrained(target, str(tmp_path / "whole.pth"))
    assert same(target, source.base.state_dict()) and torch.equal(linear, target.linear.weight)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    network = network_of("squeezenet1_1")
    before = {k: v.clone() for k, v in network.base.state_dict().items()}
    state = squeezenet_state()
    path = tmp_path / "weights.pth"
    for broken, sentence in (
        ({k: v for k, v in state.items() if k != "features.0.weight"}, "has no 'features.0.weight'"),
        ({**state, "features.0.bias": torch.zeros(3)}, r"'features.0.bias' of shape \(3,\).*\(64,\)"),
        ({**state, "layer9.weight": torch.zeros(3)}, "'layer9.weight', which squeezenet1_1 does not have"),
        ({"epoch": 3}, "holds no state dict"),
        ({"weights": Path("x")}, "no readable weight file"),
    ):
        torch.save(broken, path)
        with pytest.raises(UserError, match=sentence):
            load_pretrained(network, str(path))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="no readable weight file"):
        load_pretrained(network, str(path))
    assert all(torch.equal(before[k], v) for k, v in network.base.state_dict().items())


def test_googlenet_from_hdf5(server, tmp_path, monkeypatch):
    folder, url = server
    torch.manual_seed(3)
    state = build_network(NetworkSpec("googlenet")).base.state_dict()
    with h5py.File(folder / "googlenet.h5", "w") as file:
        for key, value in state.items():
            file[f"weights/{key}/weights"] = value.numpy()
    network = network_of("googlenet")
    assert load_pretrained(network, str(folder / "googlenet.h5")).startswith("googlenet.h5 (sha256 ")
    assert same(network, state)

    source = Published(
        f"{url}/googlenet.h5", "googlenet", hashlib.md5((folder / "googlenet.h5").read_bytes()).hexdigest()
    )
    monkeypatch.setitem(pretrained.OURS, "googlenet", source)
    network = network_of("googlenet")
    assert load_pretrained(network, "auto", cache=str(tmp_path / "cache")) == "googlenet"
    assert same(network, state)

    with h5py.File(folder / "googlenet.h5", "a") as file:
        del file["weights/conv2.3x3.bias"]
    with pytest.raises(UserError, match=r"has no 'conv2.3x3.bias'"):
        load_pretrained(network, str(folder / "googlenet.h5"))
    (folder / "googlenet.h5").write_bytes(b"not hdf5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        load_pretrained(network, str(folder / "googlenet.h5"))


def test_inception_from_an_old_file(tmp_path):
    source = build_network(NetworkSpec("inception_v1bn")).base.state_dict()
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    old = {k: v[None] if "_bn." in k else v for k, v in old.items()}
    old.update({"last_linear.weight": torch.zeros(1000, 1024), "last_linear.bias": torch.zeros(1000)})
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = network_of("inception_v1bn")
    load_pretrained(network, str(tmp_path / "old.pth"))
    assert same(network, source)


def test_densenet_files_have_older_names(tmp_path):
    from torchvision import models

    state = models.densenet121(weights=None).state_dict()
    old = {}
    for key, value in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in key:
                key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    network = network_of("densenet121")
    load_pretrained(network, str(tmp_path / "densenet.pth"))
    assert same(network, state)


def test_vit_positions_are_interpolated_to_another_size():
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import interpolate_embeddings

    def vit(size):
        return VisionTransformer(size, 32, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)

    state = vit(64).state_dict()
    torch.nn.init.normal_(state["encoder.pos_embedding"])
    fitted = pretrained._fit_positions(SimpleNamespace(base=vit(96)), dict(state))
    expected = interpolate_embeddings(96, 32, dict(state))["encoder.pos_embedding"]
    assert torch.equal(fitted["encoder.pos_embedding"], expected) and expected.shape == (1, 10, 8)
    assert torch.equal(fitted["class_token"], state["class_token"])
