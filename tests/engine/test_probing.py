"""Linear probes: only the classifier learns, whatever network is probed; killed and resumed; refused where nothing fits."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from killing import Killed, history, kill_at, same
from tiny import THREADS, TINY, write_images

from metric_kd.cli.main import main as command
from metric_kd.cli.making import make_settings
from metric_kd.cli.parse import parse
from metric_kd.cli.probe import main as probe
from metric_kd.cli.session import checked
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.engine.probing import Probe, probed
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch

SMALL = ["--dataset", "folder", "--batch", "8", "--device", "cpu", "--save_minutes", "0", "--epochs", "10"]


@pytest.fixture(scope="module")
def other_images(tmp_path_factory) -> Path:
    """Five classes of 64 px, none of which a network below has seen."""
    return write_images(tmp_path_factory.mktemp("other") / "images", 5, 10, size=64, seed=9)


@pytest.fixture(scope="module")
def classifier(image_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("classifier") / "run"
    torch.set_num_threads(int(THREADS))
    flags = ["--task", "classification", "--dataset", "folder", "--base", "resnet8_x0.5:stem_stride=2", "--batch", "16"]
    train([*flags, "--epochs", "2", "--device", "cpu", "--data", str(image_folder), "--save_dir", str(run)])
    return run


def flags_of(run: Path, images: Path, to: Path, *more: str) -> list[str]:
    return [str(run), *SMALL, "--data", str(images), "--save_dir", str(to), *more]


def test_only_the_classifier_learns(classifier, other_images, tmp_path):
    run = tmp_path / "run"
    assert command(["probe", *flags_of(classifier, other_images, run, "--lr", "0.1")]) == 0
    before, after = read_checkpoint(classifier)["model"], read_checkpoint(run)["model"]
    backbone = [key for key in before if key.startswith("base.")]
    assert len(backbone) > 20 and all(torch.equal(before[key], after[key]) for key in backbone), "statistics included"
    assert after["classifier.weight"].shape == (5, 32)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.1] * 4 + [0.01] + [0.001] * 5)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert "Top-1 accuracy" in (run / "result.txt").read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optimizer"], config["nesterov"], config["weight_decay"]) == ("sgd", False, 5e-4)
    assert command(["eval", "--load", str(run), "--device", "cpu"]) == 0, "a probe is a network like others"


def test_killed_and_resumed(classifier, other_images, tmp_path, monkeypatch):
    probe(flags_of(classifier, other_images, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(12, patch)
        probe(flags_of(classifier, other_images, tmp_path / "cut"))
    assert read_checkpoint(tmp_path / "cut" / "last.pth")["position"]["step"] == 11
    probe(flags_of(classifier, other_images, tmp_path / "cut"))
    assert same(tmp_path / "whole", tmp_path / "cut") and history(tmp_path / "whole") == history(tmp_path / "cut")


def test_embedding_networks_are_probed_at_their_pooled_feature(image_folder, other_images, tmp_path):
    train([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "embedding")])
    probe(flags_of(tmp_path / "embedding", other_images, tmp_path / "run", "--epochs", "1"))
    content = read_checkpoint(tmp_path / "run")
    assert content["network"]["embedding_size"] == 0 and "linear.weight" not in content["model"]
    assert content["model"]["classifier.weight"].shape == (5, 32)


def test_no_gradient_and_no_statistics_enter_the_backbone():
    torch.manual_seed(0)
    network = probed(build_network(NetworkSpec("resnet8_x0.5:stem_stride=2", 8)), 3)
    task = Probe(network, Objective([parse_loss("cross_entropy:1,features=logits")]))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    task.build(batch, 3)
    task.train()
    task.begin_epoch(1, 1)
    assert task.training and not any(module.training for module in network.modules())
    assert [p.shape for group in task.parameter_groups() for p in group["params"]] == [(3, 32), (3,)]
    output = network(images, want=("pooled", "maps"))
    assert not output.pooled.requires_grad and not any(m.requires_grad for m in output.maps)
    total, _ = task(batch)
    total.backward()
    assert {name for name, p in network.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("base, rate", [("resnet8_x0.25", 0.02), ("mobilenet_v2_cifar", 0.01)])
def test_the_rates_of_the_paper(base, rate, tmp_path):
    network = build_network(NetworkSpec(base, 0, False, num_classes=4))
    write_checkpoint(tmp_path / "x.pth", {"network": network.spec.to_dict(), "model": network.state_dict()})

    def settings(*words):
        config = checked(parse("probe", ["--load", str(tmp_path / "x.pth"), *words])).config
        made = make_settings(config, 10)
        return config.base, made.lr, tuple(made.lr_decay_epochs), made.epochs

    assert settings() == (base, rate, (21, 26), 50)
    assert settings("--lr", "0.3", "--lr_decay_epochs", "4")[1:3] == (0.3, (4,))
    file = tmp_path / "again.yaml"
    file.write_text("lr: 0.3\nlr_for: []\n")  # as a run's config.yaml has it where --lr was given
    assert settings("--config", str(file))[1] == 0.3
    assert settings("--lr_for", "resnet*=0.5", "--lr_for", "mobile*=0.5")[1] == 0.5


def test_what_cannot_be_is_refused(classifier, other_images, tmp_path):
    common = [*SMALL, "--data", str(other_images), "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="nothing to probe"):
        probe(common)
    with pytest.raises(UserError, match="does not exist"):
        probe(["nowhere", *common])
    with pytest.raises(UserError, match="leave --freeze_bn out"):
        probe([str(classifier), *common, "--freeze_bn"])
    with pytest.raises(UserError, match="--task"):
        probe([str(classifier), *common, "--task", "embedding"])
    with pytest.raises(UserError, match="loss .st. does not"):
        probe([str(classifier), *common, "--loss", "st:1"])
    with pytest.raises(UserError, match="a probe trains a classifier of frozen features"):
        probe([str(classifier), *common, "--loss", "l2_triplet:1"])
    with pytest.raises(UserError, match="--student_init"):
        probe([str(classifier), *common, "--student_init", str(tmp_path / "s.pth")])
    assert not (tmp_path / "run").exists()


@pytest.fixture
def forked_trials():
    """The trial has a fresh interpreter, as users have it."""


def test_dry_run_writes_nothing(classifier, other_images, tmp_path, capfd):
    probe(flags_of(classifier, other_images, tmp_path / "run", "--dry_run"))
    assert "losses: cross_entropy" in capfd.readouterr().out and not (tmp_path / "run").exists()
