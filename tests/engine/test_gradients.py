"""--log_gradients: shares by hand, training bit for bit as without, killed and resumed, and what it refuses."""

import os
import socket

import pytest
import template
import torch
from killing import Killed, history, kill_at, same
from small_steps import CPU, batch, gradients, part, task
from tiny import THREADS, TINY
from torch.multiprocessing.spawn import start_processes

from metric_kd import distributed
from metric_kd.cli.distill import main as distill
from metric_kd.cli.train import main as train
from metric_kd.engine.gradients import GradientShares
from metric_kd.engine.logging import epoch_line
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS

METHODS = sorted(name for name in TERMS if not name.startswith("pml.") and name not in ("granularity", "imitate"))


def measured(built, *batches, **settings):
    """Shares after a step, as the trainer measures them."""
    given = {"lr": 1e-30, "optimizer": "sgd", "weight_decay": 0.0, "seed": 3, "log_gradients": 1, **settings}
    trainer = Trainer(built, Settings(epochs=1, iterations=4, **given), RunDirectory("."), None, None, CPU)
    trainer.trial_step(*batches)
    return trainer.gradients.means()


def test_shares_by_hand():
    """Every term on its own, on embeddings that are leaves."""
    specs = ["rkd_distance:1", "rkd_angle:2", "pkt:30000", "l2_triplet:1,sample=all"]
    built, data = task(*specs), batch(1)
    found = measured(built, data)
    built.train()
    with torch.no_grad():
        student = built.student_output(data)
        teacher = built.teacher_output(data)
    norms = {}
    for key, term in built.objective.items():
        leaf = student.embedding.clone().requires_grad_()
        value = built.objective.weights[key] * term(student._replace(embedding=leaf), teacher, data)
        norms[key] = float(torch.autograd.grad(value, leaf)[0].norm())
    assert found == pytest.approx({key: norm / sum(norms.values()) for key, norm in norms.items()}, rel=1e-9)
    assert sum(found.values()) == pytest.approx(1) and min(found.values()) > 0


def test_what_several_tensors_say_is_one_norm():
    """fitnet reads maps; the logits of st hang on nothing that fitnet reads but the last."""
    built, data = task("st:1", "cross_entropy:3,features=logits"), batch(1)
    found = measured(built, data)
    built.train()
    with torch.no_grad():
        student, teacher = built.student_output(data), built.teacher_output(data)
    leaf = student.logits.clone().requires_grad_()
    norms = [
        float(torch.autograd.grad(weight * term(student._replace(logits=leaf), teacher, data), leaf)[0].norm())
        for (_, term), weight in zip(built.objective.items(), (1, 3), strict=True)
    ]
    assert list(found.values()) == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_the_step_is_bit_for_bit_that_without(name):
    specs = [f"{name}:1", "l2_triplet:1,sample=distance", "rkd:1"]
    plain = gradients(task(*specs, size=12, dtype=torch.float32), batch(1), steps=2)
    other = gradients(task(*specs, size=12, dtype=torch.float32), batch(1), steps=2, log_gradients=1)
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"chunk": 4}])
def test_steps_of_several_passes(settings):
    specs, whole = ["rkd_distance:1", "cross_entropy:1"], batch(1)
    batches = [part(whole, slice(8)), part(whole, slice(8, 16))] if "accumulate" in settings else [whole]
    plain = gradients(task(*specs), batches, **settings)
    other = gradients(task(*specs), batches, log_gradients=1, **settings)
    assert all(torch.equal(value, other[key]) for key, value in plain.items())
    found = measured(task(*specs), *batches, **settings)
    assert sum(found.values()) == pytest.approx(1) and min(found.values()) > 0
    if "chunk" in settings:
        assert found == pytest.approx(measured(task(*specs), whole), rel=1e-9)


def test_a_loss_without_gradient_counts_nothing():
    built = task("rkd_distance:1", "l2_triplet:1,sample=all,margin=0.0000001")
    data = batch(1)._replace(labels=torch.arange(16))  # no positives: the triplet loss is 0
    found = measured(built, data)
    assert found["l2_triplet"] == 0 and found["rkd_distance"] == 1
    shares = GradientShares(task("rkd:1"), 3, CPU)
    assert shares.means() == {}
    with shares.measuring(2):
        assert shares.objective.norms is None
    with pytest.raises(ZeroDivisionError), shares.measuring(3):
        assert shares.objective.norms == []
        1 / 0  # noqa: B018
    assert shares.objective.norms is None and shares.count == 0


def test_a_stage_of_its_own_is_measured():
    built = task("ft:1")
    trainer = Trainer(
        built,
        Settings(epochs=4, iterations=4, lr=1e-30, optimizer="sgd", log_gradients=1),
        RunDirectory("."),
        None,
        None,
        CPU,
    )
    assert trainer.stage_name is not None
    trainer.trial_step(batch(1))
    assert all(share == 0 for share in trainer.gradients.means().values()), "the student rests"


def flags(data, teacher, run, *more):
    losses = ["--loss", "rkd_distance:1", "--loss", "l2_triplet:1,sample=distance"]
    return [*TINY, "--data", str(data), "--teacher_load", str(teacher), "--save_dir", str(run), "--save_minutes", "0",
            *losses, *more]  # fmt: skip


def test_runs_with_and_without(image_folder, teacher_run, tmp_path, monkeypatch, capsys):
    distill(flags(image_folder, teacher_run, tmp_path / "plain"))
    distill(flags(image_folder, teacher_run, tmp_path / "logged", "--log_gradients", "2"))
    assert "of the gradient: rkd_distance" in capsys.readouterr().out
    assert same(tmp_path / "plain", tmp_path / "logged")
    records = history(tmp_path / "logged")
    assert [sum(r.pop("gradient_shares").values()) for r in history(tmp_path / "logged")] == pytest.approx([1, 1])
    for record, plain in zip(records, history(tmp_path / "plain"), strict=True):
        assert {k: v for k, v in record.items() if k != "gradient_shares"} == plain
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(4, patch)
        distill(flags(image_folder, teacher_run, cut, "--log_gradients", "2"))
    distill(flags(image_folder, teacher_run, cut, "--log_gradients", "2"))
    assert same(tmp_path / "logged", cut) and history(cut) == records


def test_refusals(image_folder, tmp_path):
    run = ["--data", str(image_folder), "--save_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="--log_gradients is -1"):
        train([*TINY, *run, "--log_gradients", "-1"])
    with pytest.raises(UserError, match="one student; leave it out"):
        distill([*TINY, *run, "--mutual", "resnet8", "--log_gradients", "1"])
    line = epoch_line(
        {"epoch": 1, "loss": 1.0, "losses": {"a": 1.0}, "gradient_shares": {"a": 0.25}, "seconds": 1.0}, "epoch", 2
    )
    assert line.endswith("a 1.0000  of the gradient: a 25%  1.0 s")


def work(rank, port, folder):
    torch.set_num_threads(int(THREADS))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(CPU)
    found = {}
    for every in (0, 1):
        found[every] = gradients(task("rkd_distance:1", "cross_entropy:1"), batch(1), share=True, log_gradients=every)
    half = part(batch(1), slice(8 * rank, 8 * rank + 8))
    built = task("rkd_distance:1", "l2_triplet:3,sample=all")
    found["shares"] = measured(built, half)
    torch.save(found, folder / f"{rank}.pt")
    distributed.stop()


def test_two_processes(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    template.ready()
    start_processes(work, (port, tmp_path), nprocs=2, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for findings in found:
        assert all(torch.equal(value, findings[1][key]) for key, value in findings[0].items())
    assert found[0]["shares"] == found[1]["shares"] and sum(found[0]["shares"].values()) == pytest.approx(1)
    alone = measured(task("rkd_distance:1", "l2_triplet:3,sample=all"), batch(1))
    assert found[0]["shares"] == pytest.approx(alone, abs=0.1), (
        "both losses see the whole batch, of half of it the norm"
    )
