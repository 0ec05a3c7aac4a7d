"""A student imitates one layer of its teacher, then what follows the layer learns the task: end to end, killed, refused."""

import pytest
import torch
import yaml
from killing import Killed, history, kill_at, same, weights
from tiny import THREADS, TINY
from torch import nn
from torch.nn import functional as F

from metric_kd.cli import imitating
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as command
from metric_kd.cli.making import make_task
from metric_kd.cli.parse import parse
from metric_kd.cli.session import build, checked
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.engine.imitation import HeadFit, Imitation
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch, Output

SMALL = [
    "--task", "classification", "--dataset", "folder", "--base", "tiny_fc", "--batch", "16", "--epochs", "3",
    "--lr", "0.02", "--lr_decay_epochs", "9", "--device", "cpu", "--save_minutes", "0",
]  # fmt: skip
IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.arange(6) % 4, torch.arange(6))


class TinyFC(Backbone):
    """The paper's networks in small: a convolution, two linear layers with dropout before each."""

    pooled_size = 12
    input_size = 32
    layers = {"conv": "conv", "fc1": "fc1", "fc2": "fc2"}

    def __init__(self, *, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.bn = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop1, self.fc1 = nn.Dropout(), nn.Linear(8, 16)
        self.bn1 = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.drop2, self.fc2 = nn.Dropout(), nn.Linear(16, 12)

    def forward(self, images, want=("pooled",)):
        x = F.relu(self.bn(self.conv(images))).mean((2, 3))
        x = F.relu(self.bn1(self.fc1(self.drop1(x))))
        return Output(pooled=F.relu(self.fc2(self.drop2(x))))


UP_TO_FC1 = ("base.conv.", "base.bn.", "base.fc1.")


@pytest.fixture(scope="module", autouse=True)
def tiny_fc():
    BACKBONES.register("tiny_fc")(TinyFC)
    yield
    del BACKBONES._entries["tiny_fc"]


@pytest.fixture(scope="module")
def teacher(image_folder, tmp_path_factory, tiny_fc):
    run = tmp_path_factory.mktemp("imitated") / "run"
    torch.set_num_threads(int(THREADS))
    train([*SMALL, "--seed", "7", "--data", str(image_folder), "--save_dir", str(run)])
    return run


@pytest.fixture(scope="module")
def imitation(teacher, image_folder):
    """A student of fc1, beside the weights it began with."""
    run = teacher.parent / "imitation"
    flags = [*SMALL, "--epochs", "8", "--lr", "0.1", "--data", str(image_folder), "--teacher_load", str(teacher)]
    distill([*flags, "--imitate", "fc1", "--student_init", str(run) + "-start.pth", "--save_dir", str(run)])
    return run


def moved(before: dict, after: dict) -> set[str]:
    return {key for key in after if not torch.equal(before[key], after[key])}


def test_the_student_learns_the_feature_and_nothing_else(imitation, capsys):
    lines = history(imitation)
    assert [set(line["losses"]) for line in lines] == [{"imitate"}] * 8
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[0]["explained"] < lines[-1]["explained"] <= 1 and "top1" not in lines[-1]
    assert "Final share of the teacher's fc1 explained: " in (imitation / "result.txt").read_text()
    start = read_checkpoint(imitation.parent / "imitation-start.pth")["model"]
    changed = moved(start, weights(imitation))
    assert {key for key in changed if "weight" in key} >= {"base.conv.weight", "base.fc1.weight", "base.bn.weight"}
    later = {key for key in changed if not key.startswith(UP_TO_FC1)}
    assert later == {"base.bn1.running_mean", "base.bn1.running_var", "base.bn1.num_batches_tracked"}, (
        "statistics alone"
    )
    config = yaml.safe_load((imitation / "config.yaml").read_text())
    assert config["imitate"] == "fc1" and config["loss"] == ["imitate:1,layer=fc1"]
    assert command(["eval", "--load", str(imitation), "--device", "cpu"]) == 0, "a network like others"
    assert "Top-1" in capsys.readouterr().out


def test_then_what_follows_learns_the_task(imitation, image_folder, tmp_path):
    flags = [*SMALL, "--data", str(image_folder), "--load", str(imitation), "--fit_head", "auto"]
    for name, run in (("train", train), ("distill", distill)):
        run([*flags, "--save_dir", str(tmp_path / name)])
        before, after = weights(imitation), weights(tmp_path / name)
        assert len(before) == len(after)
        still = {key for key in before if key not in moved(before, after)}
        assert {key for key in before if key.startswith(UP_TO_FC1)} <= still, "bit for bit, statistics included"
        assert {"base.bn1.running_mean", "base.fc2.weight", "classifier.weight"} <= moved(before, after)
        assert "Top-1 accuracy" in (tmp_path / name / "result.txt").read_text()
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["fit_head"] == "fc1"
    assert same(tmp_path / "train", tmp_path / "distill"), "both commands do the same from labels"


def test_a_head_may_have_a_teacher(imitation, teacher, image_folder, tmp_path):
    flags = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--load", str(imitation), "--fit_head", "fc2"]
    distill([*flags, "--teacher_load", str(teacher), "--loss", "st:1", "--save_dir", str(tmp_path / "run")])
    assert moved(weights(imitation), weights(tmp_path / "run")) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("step", [2, 7])
@pytest.mark.parametrize("kind", ["imitate", "fit_head"])
def test_killed_and_resumed(kind, step, imitation, teacher, image_folder, tmp_path, monkeypatch):
    flags = [*SMALL, "--data", str(image_folder), "--schedule", "log"]
    flags += (
        ["--teacher_load", str(teacher), "--imitate", "fc1", "--select", "test"]
        if kind == "imitate"
        else ["--load", str(imitation), "--fit_head", "auto"]
    )
    distill([*flags, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(step, patch)
        distill([*flags, "--save_dir", str(tmp_path / "cut")])
    distill([*flags, "--save_dir", str(tmp_path / "cut")])
    assert same(tmp_path / "whole", tmp_path / "cut") and same(tmp_path / "whole", tmp_path / "cut", "last.pth")
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    assert [line["lr"] for line in history(tmp_path / "cut")] == pytest.approx([0.02, 0.02 * 0.1**0.5, 0.002])


def test_dropout_rests_and_statistics_are_of_the_batch():
    torch.manual_seed(0)
    made = build_network(NetworkSpec("tiny_fc:norm=false", 0, False, num_classes=4))
    objective = Objective([parse_loss("imitate:1,layer=fc2")])
    other = build_network(made.spec)
    other.load_state_dict(made.state_dict())
    for kind, expected in ((Imitation, 0.0), (Solo, None)):
        task = kind(made, other, objective)
        task.build(BATCH, 4)
        value = task.train()(BATCH)[0].item()
        assert value == expected if expected is not None else value > 0
    normed = build_network(NetworkSpec("tiny_fc", 0, False, num_classes=4))
    task = Imitation(normed, other, objective)
    task.build(BATCH, 4)
    calls = []
    normed.base.register_forward_hook(lambda *_: calls.append(1))
    task.train()(BATCH)
    assert calls == [1] and normed.base.bn.num_batches_tracked == 1
    assert task.training and normed.base.bn.training and not normed.base.drop2.training
    task.eval()
    assert not any(module.training for module in task.modules())


def test_a_head_keeps_what_runs_up_to_the_layer_in_eval_mode():
    torch.manual_seed(0)
    network = build_network(NetworkSpec("tiny_fc", 0, False, num_classes=4))
    task = HeadFit(network, None, Objective([parse_loss("cross_entropy:1,features=logits")]), "fc1")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    task.build(BATCH, 4)
    task.train()
    base = network.base
    modes = [module.training for module in (base.bn, base.drop1, base.fc1, base.bn1, base.drop2, base.fc2)]
    assert modes == [False, False, False, True, True, True]
    left = [name for name, p in network.named_parameters() if p.requires_grad]
    assert left == [f"base.{m}.{p}" for m in ("bn1", "fc2") for p in ("weight", "bias")] + [
        "classifier.weight",
        "classifier.bias",
    ]
    assert sum(len(group["params"]) for group in task.parameter_groups()) == len(left)
    assert not moved(before, network.state_dict()), "to look where the layer runs moves no statistic"
    task(BATCH)[0].backward()
    assert base.fc1.weight.grad is None and base.fc2.weight.grad is not None


def test_embeddings_are_found_and_explained(teacher_run, image_folder, tmp_path):
    flags = [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--select", "test"]
    distill([*flags, "--embedding_size", "16", "--imitate", "embedding", "--save_dir", str(tmp_path / "run")])
    text = (tmp_path / "run" / "result.txt").read_text()
    assert text.startswith("Best Recall@1: ") and "Best share of the teacher's embedding explained: " in text
    assert {"recall@1", "explained"} <= set(history(tmp_path / "run")[-1])
    with pytest.raises(UserError, match="compares features of one shape"):
        distill([*flags, "--imitate", "pooled", "--save_dir", str(tmp_path / "other")])
    with pytest.raises(UserError, match="unknown layer 'fc1'"):
        distill([*flags, "--imitate", "fc1", "--save_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_the_best_may_be_far_below_zero(teacher, image_folder, tmp_path, monkeypatch):
    shares = iter([-5.0, -3.0, -4.0])
    monkeypatch.setattr(imitating, "evaluate_imitation", lambda *_, **__: next(shares))
    flags = [*SMALL, "--data", str(image_folder), "--teacher_load", str(teacher), "--imitate", "conv"]
    distill([*flags, "--select", "test", "--save_dir", str(tmp_path / "run")])
    assert "explained: -300.0000 (epoch 2, selected on test)" in (tmp_path / "run" / "result.txt").read_text()


def test_a_teacher_that_sees_larger_images(teacher, image_folder, tmp_path):
    flags = [*SMALL, "--data", str(image_folder), "--teacher_load", str(teacher), "--imitate", "fc1"]
    distill([*flags, "--input_size", "24", "--select", "val", "--save_dir", str(tmp_path / "run")])
    assert "val_explained" in history(tmp_path / "run")[0]
    session = build(checked(parse("distill", [*flags, "--input_size", "24"])))
    batch = next(session.test.test(4))
    assert batch.images.shape[-1] == 24 and batch.teacher_images.shape[-1] == 32
    assert isinstance(make_task(session), Imitation)


def test_what_cannot_be_fitted(imitation, teacher, image_folder, tmp_path):
    run = tmp_path / "run"
    flags = [*SMALL, "--data", str(image_folder), "--save_dir", str(run)]
    with pytest.raises(UserError, match="is no run of --imitate; name the layer"):
        train([*flags, "--load", str(teacher), "--fit_head", "auto"])
    with pytest.raises(UserError, match="--fit_head fc3: nothing of the network comes after that layer"):
        train([*flags, "--load", str(imitation), "--fit_head", "fc3"])
    with pytest.raises(UserError, match="did you mean 'fc"):
        train([*flags, "--load", str(imitation), "--fit_head", "fc9"])
    with pytest.raises(UserError, match="with base tiny_fc, but the flags say resnet8"):
        train([*flags, "--base", "resnet8", "--load", str(imitation), "--fit_head", "conv"])
    torch.save({"base.fc1.weight": torch.zeros(16, 8)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="has no 'base.bn.running_mean' that fits|has no 'base.conv.weight' that fits"):
        train([*flags, "--load", str(tmp_path / "part.pth"), "--fit_head", "fc1"])
    assert not run.exists()


def test_a_head_that_no_loss_reads(image_folder, tmp_path):
    network = build_network(NetworkSpec("resnet8_x0.25:stem_stride=2", 8, num_classes=4))
    write_checkpoint(tmp_path / "x.pth", {"network": network.spec.to_dict(), "model": network.state_dict()})
    flags = [*TINY, "--base", network.spec.base, "--classifier", "true", "--data", str(image_folder)]
    flags += ["--load", str(tmp_path / "x.pth"), "--fit_head", "embedding", "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="the losses read embedding, which comes before or is layer 'embedding'"):
        train([*flags, "--loss", "l2_triplet:1"])
    assert not (tmp_path / "run").exists()
    train([*flags, "--loss", "cross_entropy:1", "--epochs", "1"])
    assert moved(network.state_dict(), weights(tmp_path / "run")) == {"classifier.weight", "classifier.bias"}


def test_dry_run(teacher, image_folder, tmp_path, monkeypatch):
    from metric_kd.cli.dry_run import _one_step

    flags = [*SMALL, "--data", str(image_folder), "--teacher_load", str(teacher), "--imitate", "fc1"]
    told = _one_step("distill", [*flags, "--save_dir", str(tmp_path / "run")])
    assert "losses: imitate:1,layer=fc1" in told["summary"] and not (tmp_path / "run").exists()
