"""Classification, stages of their own, peers: every kind of run is trained, killed anywhere, resumed, and equal."""

from pathlib import Path

import pytest
import torch
from killing import Killed, history, kill_at, weights
from tiny import THREADS

from metric_kd.cli.distill import main as distill
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError

SMALL = [
    "--task", "classification", "--dataset", "folder", "--base", "resnet8_x0.25:stem_stride=2", "--batch", "16",
    "--epochs", "4", "--lr", "0.02", "--device", "cpu", "--save_minutes", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(image_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("classifier") / "run"
    torch.set_num_threads(int(THREADS))
    train([*SMALL, "--base", "resnet8_x0.5:stem_stride=2", "--data", str(image_folder), "--save_dir", str(run)])
    return run


def test_a_baseline_learns_and_is_evaluated_again(classifier, image_folder, tmp_path, capsys):
    text = (classifier / "result.txt").read_text()
    assert "Final Top-1 accuracy" in text and "Final Top-5 accuracy" in text
    assert read_checkpoint(classifier)["network"]["num_classes"] == 8
    record = history(classifier)[-1]
    assert record["epoch"] == 4 and record["step"] == 4 * 3, "an epoch is once through the 48 training images"
    capsys.readouterr()
    assert train(["--mode", "eval", "--load", str(classifier)]) == 0
    assert f"Top-1 accuracy: {100 * record['top1']:.4f}" in capsys.readouterr().out


STAGED = {
    "ab:10,stage_epochs=2": ["ab", "ab", None, None, None, None],
    "fsp:1": ["fsp", None, None, None, None],
    "ft:200,stage_epochs=2": ["ft", "ft", None, None, None, None],
}


@pytest.mark.parametrize("loss", [*STAGED, "crd:0.8,negatives=20,dim=8", "bss:2", "vid:1", "sobolev:20"])
@pytest.mark.parametrize("step", [3, 10])
def test_killed_in_any_stage_and_resumed_gives_the_same_weights(
    loss, step, classifier, image_folder, tmp_path, monkeypatch
):
    common = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--loss", "cross_entropy:1"]
    common += ["--loss", loss]
    distill([*common, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(step, patch)
        distill([*common, "--save_dir", str(tmp_path / "cut")])
    assert read_checkpoint(tmp_path / "cut" / "last.pth")["position"]["step"] == step - 1
    distill([*common, "--save_dir", str(tmp_path / "cut")])
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    if loss in STAGED:
        assert [record.get("stage") for record in history(tmp_path / "whole")] == STAGED[loss]
        named = loss.split(":")[0]
        assert set(history(tmp_path / "whole")[0]["losses"]) == {named}
    assert {key.split(".")[0] for key in whole} == {"base", "classifier"}, "the student holds nothing of the terms"


def test_a_stage_moves_what_it_trains_and_nothing_else(classifier, image_folder, tmp_path, monkeypatch):
    common = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--loss", "cross_entropy:1"]
    seen: dict[str, dict] = {}
    enter = Trainer.enter_stage

    def noting(self, stage):
        enter(self, stage)
        seen[f"{len(seen)}"] = {key: value.clone() for key, value in self.task.state_dict().items()}

    monkeypatch.setattr(Trainer, "enter_stage", noting)
    distill([*common, "--loss", "ft:200", "--save_dir", str(tmp_path / "ft")])
    before, after = seen["0"], seen["1"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all("paraphraser" in key for key in moved)
    final = read_checkpoint(tmp_path / "ft" / "last.pth")["task"]
    assert all(torch.equal(final[key], after[key]) for key in final if "paraphraser" in key), "frozen afterwards"
    seen.clear()
    distill([*common, "--loss", "ab:10", "--save_dir", str(tmp_path / "ab")])
    before, after = seen["0"], seen["1"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("student.base") for key in moved)
    assert not any("classifier" in key for key in moved), "what has no gradient does not decay either"


def test_losses_with_a_stage_need_a_main_stage(classifier, image_folder, tmp_path):
    flags = [
        *SMALL,
        "--data",
        str(image_folder),
        "--teacher_load",
        str(classifier),
        "--save_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(UserError, match="add a loss for the main stage"):
        distill([*flags, "--loss", "ab:10"])
    with pytest.raises(UserError, match="schedules of bss leave no loss"):
        distill([*flags, "--epochs", "10", "--loss", "bss:2"])
    assert not (tmp_path / "run").exists()


def test_peers_are_killed_resumed_and_kept_each(image_folder, tmp_path, monkeypatch):
    common = [*SMALL, "--data", str(image_folder), "--mutual", "resnet8_x0.5:stem_stride=2", "--select", "test"]
    distill([*common, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(6, patch)
        distill([*common, "--save_dir", str(tmp_path / "cut")])
    distill([*common, "--save_dir", str(tmp_path / "cut")])
    for name in ("best.pth", "peer1.pth"):
        whole, cut = weights(tmp_path / "whole", name), weights(tmp_path / "cut", name)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert "peer1: Best Top-1" in (tmp_path / "whole" / "result.txt").read_text()
    record = history(tmp_path / "whole")[-1]
    assert {"student_cross_entropy", "student_dml", "peer1_cross_entropy", "peer1_dml"} == set(record["losses"])
    assert "peer1_top1" in record
    for name in ("best.pth", "peer1.pth"):
        assert train(["--mode", "eval", "--load", str(tmp_path / "whole" / name)]) == 0


def test_mutual_learning_equals_independent_optimisers():
    """One optimiser over all peers steps as one SGD per peer would, from losses computed before any step."""
    from metric_kd.engine.mutual import Mutual
    from metric_kd.engine.optimisation import Settings, make_optimizer
    from metric_kd.functional import cross_entropy, dml
    from metric_kd.losses.objective import parse_loss
    from metric_kd.models.network import NetworkSpec, build_network
    from metric_kd.types import Batch

    def networks():
        torch.manual_seed(0)
        return {
            name: build_network(NetworkSpec("resnet8_x0.25", 0, False, num_classes=4))
            for name in ("student", "peer1", "peer2")
        }

    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.arange(8) % 4, torch.arange(8))
    settings = Settings(epochs=1, iterations=1, lr=0.1, optimizer="sgd", weight_decay=1e-4)
    task = Mutual(networks(), [parse_loss("cross_entropy:1,features=logits"), parse_loss("dml:0.5")])
    task.build(batch, 4)
    task.train()
    optimizer = make_optimizer(settings, task.parameter_groups())
    others = networks()
    separate = {
        name: torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True)
        for name, net in others.items()
    }
    for network in others.values():
        network.train()
    for _ in range(2):
        optimizer.zero_grad()
        total, values = task(batch)
        total.backward()
        optimizer.step()
        logits = {name: network(images, want=("logits",)).logits for name, network in others.items()}
        for name in others:
            peers = [dml(logits[name], logits[other].detach()) for other in others if other != name]
            loss = cross_entropy(logits[name], batch.labels) + 0.5 * sum(peers) / 2
            separate[name].zero_grad()
            loss.backward()
            separate[name].step()
    assert values["student_dml"].item() == pytest.approx(
        (sum(dml(logits["student"], logits[k]) for k in ("peer1", "peer2")) / 2).item(), rel=1e-5
    )
    for name, network in others.items():
        for ours, theirs in zip(task.networks[name].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_mutual_refuses_what_cannot_teach_both_ways(image_folder, tmp_path, classifier):
    flags = [*SMALL, "--data", str(image_folder), "--mutual", "resnet8_x0.25", "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="leave it out of --mutual"):
        distill([*flags, "--loss", "cross_entropy:1", "--loss", "ab:1"])
    with pytest.raises(UserError, match="leave it out of --mutual"):
        distill([*flags, "--loss", "cross_entropy:1", "--loss", "crd:1"])
    with pytest.raises(UserError, match="leave --teacher_load or --mutual out"):
        distill([*flags, "--teacher_load", str(classifier)])


def test_students_of_a_comparison_start_alike(classifier, image_folder, tmp_path, monkeypatch):
    start = tmp_path / "start.pth"
    begun = []
    fit = Trainer.fit

    def noting(self):
        begun.append({key: value.clone() for key, value in self.task.student.state_dict().items()})
        fit(self)

    monkeypatch.setattr(Trainer, "fit", noting)
    common = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--student_init", str(start)]
    train([*common, "--save_dir", str(tmp_path / "alone")])
    st = ["--teacher_load", str(classifier), "--loss", "cross_entropy:1", "--loss", "st:0.1,temperature=4"]
    distill([*common, *st, "--seed", "5", "--save_dir", str(tmp_path / "st")])
    assert all(torch.equal(begun[0][key], begun[1][key]) for key in begun[0])
    with pytest.raises(UserError, match="needs|shape"):
        train([*common, "--base", "resnet8_x0.5", "--save_dir", str(tmp_path / "other")])


def test_a_teacher_of_other_classes_is_refused(image_folder, classifier, tmp_path):
    flags = [*SMALL, "--data", str(image_folder), "--train_classes", "4", "--teacher_load", str(classifier)]
    with pytest.raises(UserError, match="tells 8 classes apart and the data has 4"):
        distill([*flags, "--loss", "cross_entropy:1", "--loss", "st:0.1", "--save_dir", str(tmp_path / "run")])
    distill(
        [*flags, "--epochs", "1", "--loss", "cross_entropy:1", "--loss", "at:100", "--save_dir", str(tmp_path / "at")]
    )


def test_selection_on_held_out_images(image_folder, tmp_path):
    train([*SMALL, "--data", str(image_folder), "--select", "val", "--save_dir", str(tmp_path / "run")])
    assert "selected on held-out training images" in (tmp_path / "run" / "result.txt").read_text()
    assert "val_top1" in history(tmp_path / "run")[0]


def test_a_stage_beside_a_memory(classifier, image_folder, tmp_path):
    """crd has no constant yet while ab has its stage; that is no number gone wrong."""
    flags = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--loss", "cross_entropy:1"]
    distill([*flags, "--loss", "ab:10", "--loss", "crd:0.8,negatives=20", "--save_dir", str(tmp_path / "run")])


def test_a_last_batch_of_one_image_is_left_out(image_folder, tmp_path):
    flags = [*SMALL, "--data", str(image_folder), "--base", "resnet18", "--input_size", "32", "--pretrained", "false"]
    train([*flags, "--batch", "47", "--epochs", "1", "--save_dir", str(tmp_path / "run")])
    assert history(tmp_path / "run")[-1]["step"] == 1, "48 images are a batch of 47 and one that is left out"


def test_the_shared_start_is_written_by_a_run_and_by_nothing_else(classifier, image_folder, tmp_path):
    start = tmp_path / "new" / "start.pth"
    common = [*SMALL, "--data", str(image_folder), "--epochs", "1", "--student_init", str(start)]
    train([*common, "--save_dir", str(tmp_path / "run"), "--dry_run"])
    assert not start.exists(), "a trial writes nothing"
    with pytest.raises(UserError):
        distill([*common, "--teacher_load", str(classifier), "--loss", "st:1", "--train_classes", "4"])
    assert not start.parent.exists(), "a refused run writes nothing"
    train([*common, "--seed", "9", "--save_dir", str(tmp_path / "run")])
    written = start.read_bytes()
    train([*common, "--seed", "8", "--save_dir", str(tmp_path / "other")])
    assert start.read_bytes() == written and [p.name for p in start.parent.iterdir()] == ["start.pth"]
    start.unlink()
    train([*common, "--seed", "9", "--epochs", "2", "--save_dir", str(tmp_path / "run")])
    assert not start.exists(), "a run that goes on has started long ago"


def test_history_survives_another_number_of_epochs(classifier, image_folder, tmp_path, monkeypatch):
    common = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--loss", "cross_entropy:1"]
    common += ["--loss", "ab:10", "--save_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(3 * (4 + 6) + 2, patch)  # a stage of a quarter of 16 epochs, then in epoch 7
        distill([*common, "--epochs", "16"])
    distill([*common, "--epochs", "8"])
    assert [record["epoch"] for record in history(tmp_path / "run") if "stage" not in record] == list(range(1, 9))


def test_a_stage_leaves_no_gradient_behind(classifier, image_folder, tmp_path, monkeypatch):
    """Clipped steps would otherwise depend on whether the run was resumed."""
    common = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--clip_norm", "0.5"]
    common += ["--loss", "cross_entropy:1", "--loss", "ab:10", "--loss", "ft:200"]
    distill([*common, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(5, patch)
        distill([*common, "--save_dir", str(tmp_path / "cut")])
    distill([*common, "--save_dir", str(tmp_path / "cut")])
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_trial_steps_through_every_stage(classifier, image_folder, tmp_path, capsys):
    flags = [*SMALL, "--data", str(image_folder), "--teacher_load", str(classifier), "--epochs", "40", "--dry_run"]
    distill(
        [*flags, "--loss", "cross_entropy:1", "--loss", "ab:10", "--loss", "bss:2", "--save_dir", str(tmp_path / "r")]
    )
    output = capsys.readouterr().out
    assert "stage ab, 10 epochs before the main stage: ab " in output
    assert "(cross_entropy " in output and ", bss " in output and not (tmp_path / "r").exists()


def test_a_classifier_is_measured_on_its_own_classes_only(classifier, teacher_run, image_folder, tmp_path):
    with pytest.raises(UserError, match="tells 8 classes apart and the data has 4"):
        train(["--mode", "eval", "--load", str(classifier), "--train_classes", "4"])
    with pytest.raises(UserError, match="no classifier"):
        train(["--mode", "eval", "--task", "classification", "--load", str(teacher_run)])
    names = tmp_path / "names.txt"
    first = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--train_classes", "4"]
    train([*first, "--save_dir", str(tmp_path / "first")])
    names.write_text("\n".join(f"class{c:02d}" for c in range(4, 8)))
    flags = [*SMALL, "--data", str(image_folder), "--train_classes", str(names), "--save_dir", str(tmp_path / "last")]
    with pytest.raises(UserError, match="other classes apart"):
        distill([*flags, "--teacher_load", str(tmp_path / "first"), "--loss", "cross_entropy:1", "--loss", "st:1"])


def test_peers_have_rates_of_their_own(image_folder, tmp_path):
    flags = [*SMALL, "--epochs", "1", "--data", str(image_folder), "--mutual", "resnet8_x0.5:stem_stride=2"]
    distill([*flags, "--lr_for", "resnet8_x0.5*=0.001", "--save_dir", str(tmp_path / "run")])
    state = read_checkpoint(tmp_path / "run" / "last.pth")
    assert [group["factor"] for group in state["optimizer"]["param_groups"]] == [1.0, 0.05]
    assert state["config"]["lr"] == 0.02 and state["config"]["peer_lr"] == [0.001]
    with pytest.raises(UserError, match="one positive rate for each --mutual"):
        distill([*flags, "--peer_lr", "0.1", "0.2", "--save_dir", str(tmp_path / "other")])
