"""--accumulate: one step from several batches, against the mean of their gradients and against one large batch."""

import numpy as np
import pytest
import torch
from killing import Killed, history, kill_at, same
from small_steps import assert_equal, batch, gradients, part, stepping, task
from tiny import TINY

from metric_kd.cli.train import main as train
from metric_kd.engine import reproducibility
from metric_kd.engine.accumulation import groups
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.errors import UserError

SPECS = ["cross_entropy:1", "st:1", "fitnet:1"]
"""Means over images."""


@pytest.mark.parametrize("sizes", [[8, 8], [4, 4, 4, 4], [6, 6, 4]])
def test_means_over_images_are_those_of_one_large_batch(sizes):
    whole, ends = batch(1), np.cumsum(sizes)
    parts = [part(whole, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    ours = gradients(task(*SPECS), parts, accumulate=len(sizes))
    assert_equal(ours, gradients(task(*SPECS), whole), 1e-9)


def test_terms_that_relate_images_see_one_batch_each():
    """The oracle: the mean of two losses, each with the random numbers of its own part of the step."""
    specs = ["rkd:1", "l2_triplet:1,sample=distance"]
    parts, slow = [batch(1, 8), batch(2, 8)], task(*specs)
    slow.train()
    totals = []
    for number, half in enumerate(parts):
        reproducibility.seed_step(3, 1, 0, number)
        totals.append(slow(half)[0])
    (sum(totals) / 2).backward()
    ours = gradients(task(*specs), parts, accumulate=2)
    for name, parameter in slow.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[f"0 0 {name}"], parameter.grad, rtol=1e-9, atol=1e-13), name
    assert float(ours["0 0 loss"]) == pytest.approx(float(sum(totals).detach() / 2), rel=1e-12)


def test_one_batch_is_what_it_always_was():
    built, expected = task(*SPECS), task(*SPECS)
    ours = gradients(built, batch(1))
    expected.train()
    total, values = expected(batch(1))
    total.backward()
    for name, parameter in expected.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[f"0 0 {name}"], parameter.grad, rtol=1e-12, atol=1e-14)
    assert all(float(ours[f"0 0 {name}"]) == pytest.approx(float(value), rel=1e-12) for name, value in values.items())


def test_random_numbers_depend_on_seed_step_rank_and_part():
    def drawn(*numbers):
        reproducibility.seed_step(*numbers)
        return float(torch.rand(())), float(np.random.rand())

    draws = [drawn(1, 2, 0), drawn(1, 2, 0, 1), drawn(1, 2, 0, 2), drawn(1, 3, 0, 1), drawn(1, 2, 1, 1), drawn(1, 2, 1)]
    assert len(set(draws)) == len(draws) and drawn(1, 2, 0, 0) == draws[0] == drawn(1, 2, 0)
    # The first part's are those that runs have always had.
    seed = int(np.random.SeedSequence([1, 2, 0]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    assert draws[0][0] == float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def test_batches_are_grouped_in_order_and_the_last_group_may_be_short():
    assert list(groups(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(groups([], 3)) == [] and list(groups(range(2), 1)) == [[0], [1]]


def flags(data, run, *more):
    return [
        *TINY, "--data", str(data), "--save_dir", str(run), "--save_minutes", "0", "--accumulate", "3",
        "--loss", "l2_triplet:1,sample=distance", *more,
    ]  # fmt: skip


def test_steps_are_counted_logged_killed_and_resumed(image_folder, tmp_path, monkeypatch):
    train(flags(image_folder, tmp_path / "whole"))
    records = history(tmp_path / "whole")
    assert [record["step"] for record in records] == [4, 8], "steps of the optimiser, of three batches each"
    for step in (1, 3, 6):
        cut = tmp_path / f"cut{step}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(step, patch)
            train(flags(image_folder, cut))
        train(flags(image_folder, cut))
        assert same(tmp_path / "whole", cut) and history(cut) == records
    train(flags(image_folder, tmp_path / "one", "--accumulate", "1"))
    assert not same(tmp_path / "whole", tmp_path / "one")
    with pytest.raises(UserError, match="a run with accumulate 3, this one has 2"):
        train(flags(image_folder, tmp_path / "whole", "--accumulate", "2"))


def test_a_pass_through_the_images_has_fewer_steps(image_folder, tmp_path):
    arguments = ["--task", "classification", "--dataset", "folder", "--base", "resnet8_x0.25:stem_stride=2"]
    arguments += [
        "--batch",
        "10",
        "--accumulate",
        "2",
        "--epochs",
        "2",
        "--data",
        str(image_folder),
        "--schedule",
        "cosine",
    ]
    train([*arguments, "--save_dir", str(tmp_path / "run")])
    assert [record["step"] for record in history(tmp_path / "run")] == [3, 6], (
        "48 images: batches of 10, 10 | 10, 10 | 8"
    )
    state = read_checkpoint(tmp_path / "run" / "last.pth")
    assert state["position"]["of"] == 3 and state["config"]["accumulate"] == 2
    counts = [int(v) for k, v in state["model"].items() if k.endswith("num_batches_tracked")]
    assert set(counts) == {10}
    # Half a cosine over 6 steps: the last begins at 5/6.
    assert history(tmp_path / "run")[-1]["lr"] == pytest.approx(0.1 * 0.5 * (1 + np.cos(np.pi * 5 / 6)))


def test_a_scaler_scales_every_batch_once():
    parts = [batch(1, 8), batch(2, 8)]
    moves = []
    for precision in ("fp32", "fp16"):  # of the trainer; the networks compute in float64
        built = task(*SPECS)
        trainer = stepping(built, precision=precision, accumulate=2, lr=0.1)
        before = [p.detach().clone() for p in built.parameters()]
        trainer.trial_step(*parts)
        moves.append([p.detach() - b for p, b in zip(built.parameters(), before, strict=True)])
    assert any(move.abs().max() > 0 for move in moves[0])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(*moves, strict=True))


def test_out_of_memory_names_the_flag_that_keeps_the_step():
    built = task("cross_entropy:1")
    compare = built.compare

    def hungry(student, teacher, whole):
        if len(whole.labels) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compare(student, teacher, whole)

    built.compare = hungry
    with pytest.raises(
        UserError, match=r"run with --batch 8, and with --accumulate 4 if a step shall see as many images\."
    ):
        stepping(built, accumulate=2).trial_step(batch(1), batch(2))


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_step_has_a_batch(count, tmp_path):
    with pytest.raises(UserError, match=f"--accumulate is {count}; give 1 or more."):
        train(flags(tmp_path / "none", tmp_path / "run", "--accumulate", count))
    assert not (tmp_path / "run").exists()
