"""The stages of multi-granularity distillation through the commands: fitted, killed, resumed, composed, refused."""

import json
from pathlib import Path

import pytest
import torch
from killing import Killed, history, kill_at, same
from tiny import THREADS, write_images

from metric_kd.cli.distill import main as distill
from metric_kd.cli.granularity import main as fit_coders
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError

SMALL = [
    "--task", "classification", "--dataset", "folder", "--base", "resnet8_x0.25:stem_stride=2", "--batch", "16",
    "--epochs", "2", "--lr", "0.02", "--device", "cpu", "--save_minutes", "0",
]  # fmt: skip
BRIEF = ["--epochs", "4", "--batch", "16", "--device", "cpu", "--save_minutes", "0", "--abstract_dim", "5"]


@pytest.fixture(scope="module")
def classifier(image_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("classifier") / "run"
    torch.set_num_threads(int(THREADS))
    train([*SMALL, "--base", "resnet8_x0.5:stem_stride=2", "--data", str(image_folder), "--save_dir", str(run)])
    return run


@pytest.fixture(scope="module")
def coders(classifier, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("coders") / "run"
    torch.set_num_threads(int(THREADS))
    fit_coders([*BRIEF, "--teacher_load", str(classifier), "--save_dir", str(run)])
    return run


@pytest.fixture
def student(classifier, coders, image_folder, tmp_path):
    """The flags of a distillation; the fixture's value takes further ones."""

    def flags(*more: str, to: str = "run") -> list[str]:
        files = ["--data", str(image_folder), "--teacher_load", str(classifier), "--save_dir", str(tmp_path / to)]
        return [*SMALL, *files, "--granularity_load", str(coders), "--loss", "cross_entropy:1", *more]

    return flags


def test_the_file_of_coders_describes_itself(classifier, coders):
    content = read_checkpoint(coders)
    assert content["coders"] == {
        "pooled": 32, "outputs": 8, "decodes": "logits", "abstract": 5, "detailed": 256,
        "teacher": json.loads((coders / "card.json").read_text())["environment"]["teacher"],
    }  # fmt: skip
    assert "network" not in content, "it is no network, and cannot be taken for one"
    text = (coders / "result.txt").read_text()
    assert "Top-1 accuracy of the abstract decoder" in text and "Top-1 accuracy of the detailed decoder" in text
    lines = history(coders)
    assert (
        set(lines[0]["losses"]) == {"abstract", "detailed"}
        and lines[-1]["losses"]["abstract"] < lines[0]["losses"]["abstract"]
    )
    assert "abstract_top1" in lines[-1] and "abstract_top1" not in lines[0], "decoders are evaluated seldom"
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_fitting_is_killed_and_resumed(classifier, coders, tmp_path, monkeypatch):
    flags = [*BRIEF, "--teacher_load", str(classifier), "--save_dir", str(tmp_path / "cut")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(5, patch)
        fit_coders(flags)
    assert read_checkpoint(tmp_path / "cut" / "last.pth")["position"]["step"] == 4
    fit_coders(flags)
    assert same(coders, tmp_path / "cut") and history(coders) == history(tmp_path / "cut")


def test_the_teacher_is_not_touched(classifier, tmp_path, monkeypatch):
    seen = []
    fit = Trainer.fit

    def watching(self):
        teacher = self.task._frozen[0]
        before = weights_digest(teacher)
        fit(self)
        seen.append(
            (before, weights_digest(teacher), teacher.training, any(p.grad is not None for p in teacher.parameters()))
        )

    monkeypatch.setattr(Trainer, "fit", watching)
    fit_coders([*BRIEF, "--epochs", "1", "--teacher_load", str(classifier), "--save_dir", str(tmp_path / "run")])
    before, after, training, graded = seen[0]
    assert before == after and not training and not graded


@pytest.mark.parametrize("kind, losses", [("mag", ["at:1000"]), ("mas", ["st:0.8,temperature=4", "rkd:1"])])
def test_a_student_is_killed_and_resumed_and_ships_no_coder(
    kind, losses, student, classifier, coders, tmp_path, monkeypatch
):
    flags = ["--granularity", kind, *(word for loss in losses for word in ("--loss", loss))]
    distill(student(*flags, to="whole"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        distill(student(*flags, to="cut"))
    state = read_checkpoint(tmp_path / "cut" / "last.pth")
    assert any(key.startswith("objective.terms.granularity.encoders") for key in state["task"])
    assert state["task"]["objective.terms.granularity.encoders.abstract.2.weight"].shape == (5, 16)
    distill(student(*flags, to="cut"))
    assert same(tmp_path / "whole", tmp_path / "cut") and history(tmp_path / "whole") == history(tmp_path / "cut")
    assert {key.split(".")[0] for key in read_checkpoint(tmp_path / "whole")["model"]} == {"base", "classifier"}
    assert "granularity" in history(tmp_path / "whole")[0]["losses"]
    assert train(["--mode", "eval", "--load", str(tmp_path / "whole")]) == 0


def test_mas_differs_from_mag_by_the_target(student, tmp_path):
    for kind in ("mag", "mas"):
        distill(student("--granularity", kind, "--loss", "st:0.8,temperature=4", "--epochs", "1", to=kind))
    mag, mas = (history(tmp_path / kind)[0]["losses"] for kind in ("mag", "mas"))
    assert mag["st"] != mas["st"]


def test_peers_sum_up_their_features_for_each_other(image_folder, tmp_path, monkeypatch):
    common = [*SMALL, "--data", str(image_folder), "--mutual", "resnet8_x0.5:stem_stride=2", "--granularity", "mag"]
    distill([*common, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        distill([*common, "--save_dir", str(tmp_path / "cut")])
    state = read_checkpoint(tmp_path / "cut" / "last.pth")["task"]
    assert {key.split(".")[1] for key in state if key.startswith("encoders.")} == {"student", "peer1"}
    assert not any("between" in key for key in state), "one pair of encoders per network, for all directions"
    distill([*common, "--save_dir", str(tmp_path / "cut")])
    for name in ("best.pth", "peer1.pth"):
        assert same(tmp_path / "whole", tmp_path / "cut", name)
        assert {key.split(".")[0] for key in read_checkpoint(tmp_path / "whole" / name)["model"]} == {
            "base",
            "classifier",
        }
    losses = {"cross_entropy", "dml", "granularity"}
    assert set(history(tmp_path / "whole")[-1]["losses"]) == {f"{k}_{x}" for k in ("student", "peer1") for x in losses}


def test_peers_train_both_networks_and_their_encoders():
    """The sum over peers is what each network's own loss says, with the other's codes constant."""
    from metric_kd.distill.granularity import Encoders
    from metric_kd.engine.mutual import Mutual
    from metric_kd.functional import granularity
    from metric_kd.losses.objective import parse_loss
    from metric_kd.models.network import NetworkSpec, build_network
    from metric_kd.types import Batch

    torch.manual_seed(0)
    networks = {
        name: build_network(NetworkSpec("resnet8_x0.25", 0, False, num_classes=4)) for name in ("student", "peer1")
    }
    encoders = {name: Encoders(network.pooled_size, 3, 5) for name, network in networks.items()}
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.arange(6) % 4, torch.arange(6))
    task = Mutual(networks, [parse_loss("granularity:2")], encoders=encoders)
    task.build(batch, 4)
    task.eval()
    total, values = task(batch)
    total.backward()
    got = [p.grad.clone() for p in encoders["peer1"].parameters()]
    codes = {name: encoders[name](network(images, want=("pooled",)).pooled) for name, network in networks.items()}
    wanted = 2 * granularity(codes["peer1"], codes["student"])
    assert values["peer1_granularity"].item() == pytest.approx(wanted.item() / 2, rel=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad(wanted, list(encoders["peer1"].parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_embedding_networks(teacher_run, image_folder, tmp_path):
    from tiny import TINY

    run = tmp_path / "coders"
    fit_coders([*BRIEF, "--teacher_load", str(teacher_run), "--save_dir", str(run)])
    assert read_checkpoint(run)["coders"]["decodes"] == "embedding"
    assert "Recall@1 of the abstract decoder" in (run / "result.txt").read_text()
    gaps = [line["losses"]["detailed"] for line in history(run)]
    assert gaps[-1] < gaps[0]
    common = [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--granularity_load", str(run)]
    flags = [*common, "--dist_ratio", "1", "--save_dir", str(tmp_path / "student")]
    distill([*flags, "--granularity", "mag"])
    assert "Recall@1" in (tmp_path / "student" / "result.txt").read_text()
    with pytest.raises(UserError, match="no loss with a weight reads them"):
        distill([*flags, "--granularity", "mas"])
    with pytest.raises(UserError, match="give; use --granularity mag"):
        distill([*flags, "--granularity", "mas", "--loss", "st:1", "--save_dir", str(tmp_path / "mas")])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--granularity", "mas"], "it would be mag; add one, as in --loss st"),
        (["--granularity", "mas", "--loss", "st:0", "--loss", "at:1"], "it would be mag"),
        ([], "--granularity_load needs --granularity mag"),
        (["--loss", "granularity:1"], "needs --granularity mag"),
        (["--granularity", "max"], "--granularity"),
    ],
)
def test_what_cannot_be_is_refused(flags, sentence, student, tmp_path):
    with pytest.raises(UserError, match=sentence):
        distill(student(*flags))
    assert not (tmp_path / "run").exists()


def test_files_and_teachers_that_do_not_fit_are_refused(student, classifier, coders, image_folder, tmp_path):
    def without(flag, *more):
        words = student(*more)
        at = words.index(flag)
        return words[:at] + words[at + 2 :]

    mag = ["--granularity", "mag"]
    with pytest.raises(UserError, match="run `metric-kd granularity"):
        distill(without("--granularity_load", *mag))
    with pytest.raises(UserError, match="holds no coders"):
        distill([*without("--granularity_load", *mag), "--granularity_load", str(classifier)])
    with pytest.raises(UserError, match="fitted to another teacher"):
        other = tmp_path / "other"
        train([*SMALL, "--epochs", "1", "--data", str(image_folder), "--save_dir", str(other)])
        distill([*without("--teacher_load", *mag), "--teacher_load", str(other)])
    peers = [*without("--teacher_load"), "--mutual", "resnet8_x0.25"]
    with pytest.raises(UserError, match="leave --granularity_load"):
        distill([*peers, *mag])
    at = peers.index("--granularity_load")
    with pytest.raises(UserError, match="fixed teacher"):
        distill([*peers[:at], *peers[at + 2 :], "--granularity", "mas"])
    with pytest.raises(UserError, match="a teacher is needed"):
        fit_coders(BRIEF)
    with pytest.raises(UserError, match="leave it out"):
        fit_coders([*BRIEF, "--teacher_load", str(classifier), "--loss", "st:1"])
    with pytest.raises(UserError, match="tells 8 classes apart and the data has 4"):
        fit_coders(
            [*BRIEF, "--teacher_load", str(classifier), "--train_classes", "4", "--save_dir", str(tmp_path / "x")]
        )


def test_dry_run_measures_and_writes_nothing(classifier, tmp_path, capfd):
    fit_coders([*BRIEF, "--teacher_load", str(classifier), "--save_dir", str(tmp_path / "run"), "--dry_run"])
    assert "losses: abstract, detailed" in capfd.readouterr().out and not (tmp_path / "run").exists()


def test_student_and_teacher_are_compared_inside(student, classifier, image_folder, tmp_path, capsys):
    from metric_kd.cli.analyse import main as analyse

    distill(student("--granularity", "mag"))
    run = tmp_path / "run"
    assert analyse([str(run)]) == 0
    found = json.loads((run / "analysis.json").read_text())
    layers = ["stem", "stage 1", "stage 2", "stage 3", "pooled", "abstract", "detailed", "logits"]
    assert found["student_layers"] == found["teacher_layers"] == layers and found["images"] == 16
    assert torch.tensor(found["cka"]).shape == (8, 8) and 0 < torch.tensor(found["cka"]).min() < 1
    assert set(found["noise"]) == {"student", "teacher", "stable target"}
    distill(student("--granularity", "mag", "--epochs", "1", "--resume", "never"))
    assert not (run / "analysis.json").exists(), "a run that starts over forgets what was said of the earlier one"
    analyse([str(run)])
    assert (run / "cka.png").read_bytes().startswith(b"\x89PNG")
    assert "noise of stable target" in capsys.readouterr().out
    analyse([str(classifier), "--against", str(classifier)])
    itself = json.loads((classifier / "analysis.json").read_text())
    assert itself["pooled_cka"] == pytest.approx(1) and len(itself["student_layers"]) == 6
    with pytest.raises(UserError, match="without a teacher"):
        analyse([str(classifier)])


def test_the_best_on_held_out_images(classifier, tmp_path):
    run = tmp_path / "run"
    fit_coders(
        [*BRIEF, "--teacher_load", str(classifier), "--select", "val", "--eval_every", "1", "--save_dir", str(run)]
    )
    assert "selected on held-out training images" in (run / "result.txt").read_text()
    assert "val_abstract_top1" in history(run)[0]


def test_losses_of_peers_may_be_averaged_over_entries(image_folder, tmp_path):
    common = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--mutual", "resnet8_x0.25:stem_stride=2"]
    found = []
    for k, option in enumerate(("", ",elementwise=true")):
        losses = ["--loss", f"dml:1{option}", "--loss", f"granularity:1,detailed=0{option}", "--granularity", "mag"]
        distill([*common, "--lr", "1e-9", *losses, "--save_dir", str(tmp_path / str(k))])
        found.append(history(tmp_path / str(k))[0]["losses"])
    assert found[0]["student_dml"] == pytest.approx(8 * found[1]["student_dml"], rel=1e-3)
    assert found[0]["peer1_granularity"] == pytest.approx(64 * found[1]["peer1_granularity"], rel=1e-3)


def test_coders_of_a_retrained_teacher_are_not_gone_on_with(image_folder, tmp_path):
    """The file names the teacher it was fitted to; half its steps on another one would make that a lie."""
    teacher = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--save_dir", str(tmp_path / "teacher")]
    train(teacher)
    fit = [*BRIEF, "--epochs", "1", "--teacher_load", str(tmp_path / "teacher"), "--save_dir", str(tmp_path / "coders")]
    fit_coders(fit)
    train([*teacher, "--seed", "7", "--resume", "never"])
    for epochs in ("1", "2"):
        with pytest.raises(UserError, match="holds other coders than these.*--resume never"):
            fit_coders([*fit, "--epochs", epochs])
    fit_coders([*fit, "--resume", "never"])


def test_coders_need_the_classes_of_their_teacher(classifier, tmp_path):
    other = write_images(tmp_path / "other", classes=8, per_class=4)
    for folder in sorted(other.iterdir()):
        folder.rename(other / f"x{folder.name}")
    with pytest.raises(UserError, match="tells other classes apart"):
        fit_coders(
            [*BRIEF, "--teacher_load", str(classifier), "--data", str(other), "--save_dir", str(tmp_path / "run")]
        )


def test_coders_are_no_network(coders, classifier, image_folder, tmp_path):
    with pytest.raises(UserError, match="holds the coders of a teacher, not a network"):
        train(["--mode", "eval", "--load", str(coders / "best.pth"), "--task", "classification", "--dataset", "folder",
               "--data", str(image_folder)])  # fmt: skip


@pytest.mark.parametrize("name", ["st", "logits", "dml", "lwm", "irg", "sobolev"])
def test_the_stable_target_reaches_every_method_that_reads_logits(name, classifier, coders):
    from metric_kd.engine.checkpoint import restore_network
    from metric_kd.engine.coding import coded
    from metric_kd.engine.tasks import Solo
    from metric_kd.losses.objective import Objective, parse_loss
    from metric_kd.models.network import NetworkSpec, build_network
    from metric_kd.types import Batch

    batch = Batch(torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6), torch.arange(6))
    values = []
    for stable in (False, True):
        torch.manual_seed(0)
        student = build_network(NetworkSpec("resnet8_x0.25:stem_stride=2", 0, False, num_classes=8))
        teacher = coded(restore_network(classifier, NetworkSpec("resnet8"), {}), coders, stable)
        task = Solo(student, teacher, Objective([parse_loss(f"{name}:1")]))
        task.build(batch, 8, torch.arange(8))
        values.append(task.eval()(batch)[0].item())
    assert values[0] != values[1]
