"""The record of weights: its distances are those of a hand-written loop, it survives a kill, and it is refused in words."""

import json

import pytest
import torch
from killing import Killed, history, kill_at, same
from tiny import TINY
from torch import nn

from metric_kd.cli.distill import main as distill
from metric_kd.cli.granularity import main as fit_coders
from metric_kd.cli.main import main as command
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.trainer import Trainer
from metric_kd.engine.weight_record import (
    PAPER_EPOCHS,
    WeightRecord,
    checkpoints_of,
    chosen_epochs,
    read_distances,
)
from metric_kd.engine.written import Written
from metric_kd.errors import UserError


def test_epochs_are_chosen_in_words():
    assert chosen_epochs("all", 3) == {0, 1, 2, 3}
    assert chosen_epochs("0,2,9", 5) == {0, 2, 5}, "the last is always one, later ones are none"
    assert chosen_epochs("paper", 150) == set(PAPER_EPOCHS)
    assert chosen_epochs("paper", 400) == {*PAPER_EPOCHS, 170, 190, 240, 280, 320, 360, 400}
    assert chosen_epochs("paper", 30) == {0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 18, 22, 26, 30}
    for text in ("", "1;2", "-1", "every", "1,"):
        with pytest.raises(UserError, match="write all, paper, or epochs"):
            chosen_epochs(text, 5)


def test_distances_are_those_of_a_loop(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    written = Written(tmp_path)
    record = WeightRecord(network, tmp_path / "weights", {0, 2}, lambda: {"model": network.state_dict()}, written)
    record.begin()
    weight = network[3].weight
    trace = [[weight.detach().clone()]]
    for _ in range(2):
        for _ in range(3):
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
            record.step_end()
            trace[-1].append(weight.detach().clone())
        record.epoch_end({})
        trace.append([trace[-1][-1]])
    found = read_distances(tmp_path / "weights")
    assert list(found) == ["0.weight", "3.weight"], "weights of two dimensions and more, in the order of the network"
    linear = found["3.weight"]
    assert linear.start == pytest.approx(trace[0][0].norm().item(), rel=1e-12)
    path = [sum((b - a).norm().item() for a, b in zip(t, t[1:], strict=False)) for t in trace[:2]]
    chord = [(t[-1] - t[0]).norm().item() for t in trace[:2]]
    assert linear.path == pytest.approx([0.0, *path], rel=1e-12)
    assert linear.chord == pytest.approx([0.0, *chord], rel=1e-12)
    assert list(checkpoints_of(tmp_path / "weights")) == [0, 2]
    last = read_checkpoint(tmp_path / "weights" / "epoch0002.pth")["model"]
    assert torch.equal(last["3.weight"], weight)
    (tmp_path / "weights" / "notes.txt").write_text("mine")
    written.remove()
    assert [file.name for file in (tmp_path / "weights").iterdir()] == ["notes.txt"]


def files_of(run):
    return {file.name: file.read_bytes() for file in sorted((run / "weights").glob("*.json"))}


@pytest.mark.parametrize("step", [3, 6])
def test_killed_and_resumed_gives_the_same_record(step, image_folder, tmp_path, monkeypatch):
    flags = [*TINY, "--epochs", "3", "--data", str(image_folder), "--save_minutes", "0", "--record_weights", "0,1"]
    train([*flags, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(step, patch)
        train([*flags, "--save_dir", str(tmp_path / "cut")])
    train([*flags, "--save_dir", str(tmp_path / "cut")])
    assert same(tmp_path / "whole", tmp_path / "cut") and history(tmp_path / "whole") == history(tmp_path / "cut")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
    assert list(checkpoints_of(tmp_path / "cut" / "weights")) == [0, 1, 3]
    for epoch in (0, 1, 3):
        name = f"epoch{epoch:04d}.pth"
        assert same(tmp_path / "whole" / "weights", tmp_path / "cut" / "weights", name)
    final, best = tmp_path / "cut" / "weights" / "epoch0003.pth", tmp_path / "cut" / "best.pth"
    assert all(torch.equal(read_checkpoint(final)["model"][k], v) for k, v in read_checkpoint(best)["model"].items())
    assert command(["eval", "--load", str(final), "--dataset", "folder", "--data", str(image_folder)]) == 0


def test_recording_changes_nothing(image_folder, tmp_path):
    flags = [*TINY, "--data", str(image_folder)]
    train([*flags, "--save_dir", str(tmp_path / "without")])
    train([*flags, "--save_dir", str(tmp_path / "with"), "--record_weights", "all"])
    assert same(tmp_path / "without", tmp_path / "with")
    assert not (tmp_path / "without" / "weights").exists()


def test_epochs_count_over_stages_and_every_command_records(image_folder, tmp_path):
    small = ["--task", "classification", "--dataset", "folder", "--batch", "16", "--epochs", "2", "--device", "cpu"]
    small += ["--data", str(image_folder), "--record_weights", "all"]
    train([*small, "--base", "resnet8_x0.5:stem_stride=2", "--save_dir", str(tmp_path / "teacher")])
    student = ["--base", "resnet8_x0.25:stem_stride=2", "--teacher_load", str(tmp_path / "teacher")]
    losses = ["--loss", "cross_entropy:1", "--loss", "fsp:1"]
    distill([*small, *student, *losses, "--save_dir", str(tmp_path / "student")])
    assert list(checkpoints_of(tmp_path / "student" / "weights")) == [0, 1, 2, 3], "one epoch of fsp's own stage"
    moved = read_distances(tmp_path / "student" / "weights")
    assert len(moved["classifier.weight"].path) == 4 and moved["classifier.weight"].path[1] == 0.0
    assert all(value > 0 for value in moved["base.conv1.weight"].path[1:])
    coders = [
        "--teacher_load",
        str(tmp_path / "teacher"),
        "--epochs",
        "1",
        "--record_weights",
        "all",
        "--device",
        "cpu",
    ]
    fit_coders([*coders, "--save_dir", str(tmp_path / "coders")])
    assert list(checkpoints_of(tmp_path / "coders" / "weights")) == [0, 1]
    probe = ["probe", str(tmp_path / "teacher"), "--dataset", "folder", "--data", str(image_folder), "--epochs", "1"]
    assert command([*probe, "--record_weights", "1", "--device", "cpu", "--save_dir", str(tmp_path / "probe")]) == 0
    record = read_distances(tmp_path / "probe" / "weights")
    assert record["base.conv1.weight"].path == [0.0, 0.0] and record["classifier.weight"].path[1] > 0


def test_starting_over_forgets_the_record(image_folder, tmp_path):
    flags = [*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "run")]
    train([*flags, "--record_weights", "all"])
    train([*flags, "--epochs", "1", "--resume", "never"])
    assert not (tmp_path / "run" / "weights").exists()


def test_refusals(image_folder, tmp_path):
    with pytest.raises(UserError, match="write all, paper, or epochs"):
        train([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "run"), "--record_weights", "some"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="train that run with --record_weights paper"):
        read_distances(tmp_path)
    (tmp_path / "distances.json").write_text('{"a": {"start": 1.0')
    with pytest.raises(UserError, match="copy it again"):
        read_distances(tmp_path)
    (tmp_path / "distances.json").write_text(json.dumps({"a": {"begin": 1.0}}))
    with pytest.raises(UserError, match="copy it again"):
        read_distances(tmp_path)


def test_the_trainer_tells_its_observers_in_order(image_folder, tmp_path, monkeypatch):
    told = []

    class Listener(WeightRecord):
        def begin(self):
            told.append("begin")
            super().begin()

        def step_end(self):
            told.append("step")
            super().step_end()

        def epoch_end(self, record):
            told.append(record["epoch"])
            super().epoch_end(record)

    monkeypatch.setattr("metric_kd.cli.fitting.WeightRecord", Listener)
    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self, seconds: (told.append("save"), save(self, seconds)))
    flags = [
        *TINY,
        "--iter_per_epoch",
        "2",
        "--eval_every",
        "9",
        "--data",
        str(image_folder),
        "--record_weights",
        "all",
    ]
    train([*flags, "--save_dir", str(tmp_path / "run")])
    assert told == ["begin", "step", "step", 1, "save", "step", "step", "save", 2, "save"]
