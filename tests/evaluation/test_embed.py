"""embed keeps the order, gives float32 on the CPU, and leaves the network as it was."""

import pytest
import torch
from torch import nn

from metric_kd.errors import UserError
from metric_kd.evaluation.embed import embed
from metric_kd.types import Batch, Output


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(12)
        self.linear = nn.Linear(12, 3)
        self.frozen = nn.BatchNorm1d(12)
        self.asked = None

    def forward(self, images, want=("embedding",)):
        self.asked = want
        features = self.norm(images.flatten(1).float() / 255)
        return Output(embedding=self.linear(self.frozen(features)))


def batches(count=3, size=4):
    draw = torch.Generator().manual_seed(1)
    for b in range(count):
        rows = torch.arange(b * size, (b + 1) * size)
        yield Batch(torch.randint(0, 256, (size, 3, 2, 2), dtype=torch.uint8, generator=draw), rows % 3, rows)


def test_embeds_in_order():
    network = Toy()
    found = embed(network, batches())
    network.eval()
    with torch.no_grad():
        expected = torch.cat([network(b.images).embedding for b in batches()])
    torch.testing.assert_close(found.vectors, expected)
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.indices, torch.arange(12)) and torch.equal(found.labels, torch.arange(12) % 3)
    assert network.asked == ("embedding",)
    assert not found.vectors.requires_grad and not found.vectors.is_inference()


def test_restores_every_mode_and_changes_nothing():
    network = Toy().train()
    network.frozen.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    embed(network, batches())
    assert network.training and network.norm.training and not network.frozen.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_restores_the_mode_after_an_error():
    def broken():
        yield from batches(1)
        raise RuntimeError("disk")

    network = Toy().train()
    with pytest.raises(RuntimeError, match="disk"):
        embed(network, broken())
    assert network.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_bf16_is_close_and_comes_back_as_float32():
    exact, rough = embed(Toy(), batches()).vectors, embed(Toy(), batches(), precision="bf16").vectors
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.02, rtol=0.02)


def test_progress_goes_to_stderr_only_where_asked(capsys):
    embed(Toy(), batches())
    assert capsys.readouterr() == ("", "")
    embed(Toy(), batches(), progress="embedding the gallery", total=3)
    out, err = capsys.readouterr()
    assert out == "" and "embedding the gallery" in err


def test_refuses_nothing_and_unknown_precision():
    with pytest.raises(UserError, match="no images"):
        embed(Toy(), [])
    with pytest.raises(UserError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        embed(Toy(), batches(), precision="bf61")
