"""Intermediate features through hooks."""

import pytest
import torch
from torch import nn

from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, Taps, build_network, layer_names


def test_taps_are_the_outputs_of_the_named_layers():
    base = build_network(NetworkSpec("resnet8")).base.eval()
    images = torch.randn(2, 3, 32, 32)
    with Taps(base, ["conv1", "layer2.0"]) as taps:
        out = base(images, want=("maps", "preacts"))
    torch.testing.assert_close(taps.values["conv1"], base.conv1(images))
    assert torch.equal(taps.values["layer2.0"], out.maps[2])
    assert list(taps.values) == ["conv1", "layer2.0"]
    taps.values["conv1"].sum().backward()
    assert base.conv1.weight.grad is not None
    base(images[:1])
    assert taps.values["conv1"].shape[0] == 2, "nothing is recorded outside the with"


def test_in_place_layers_do_not_overwrite_what_is_tapped():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(5, 3)
    with Taps(model, ["0"]) as taps:
        model(x)
    torch.testing.assert_close(taps.values["0"], model[0](x))
    assert model[1].inplace


def test_an_overwritten_value_is_noticed():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            return self.first(x).relu_()

    with Taps(model := Careless(), ["first"]) as taps:
        model(torch.randn(2, 3))
    with pytest.raises(UserError, match="'first' overwrites"):
        _ = taps.values


def test_errors_are_sentences():
    base = build_network(NetworkSpec("resnet8")).base
    assert "layer3.0.downsample.1" in layer_names(base) and "" not in layer_names(base)
    with pytest.raises(UserError, match=r"unknown layer 'layer2.0.conv3'; did you mean 'layer2.0.conv\d'"):
        Taps(base, ["layer2.0.conv3"])
    lstm = nn.Sequential(nn.ModuleDict())
    with pytest.raises(UserError):
        Taps(lstm, [""])


def test_hooks_and_flags_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError), Taps(model, ["0"]):
        model(torch.randn(2, 4))
    assert model[1].inplace and not model[0]._forward_hooks
