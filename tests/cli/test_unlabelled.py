"""Distillation without labels, and by teachers that are only embeddings: what is learnt, measured and refused."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from killing import Killed, kill_at, same, weights
from tiny import THREADS, TINY

from metric_kd.cli.distill import main as distill
from metric_kd.cli.embed import main as embed
from metric_kd.cli.losses import fold
from metric_kd.cli.main import main as console
from metric_kd.cli.main import run as run_command
from metric_kd.cli.making import make_batches
from metric_kd.cli.parse import parse
from metric_kd.cli.session import build, checked
from metric_kd.cli.unlabelled import hold_out, refusals
from metric_kd.data.records import ImageRecords
from metric_kd.deploy.embedder import load
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.errors import UserError
from metric_kd.evaluation.agreement import neighbours_of, share_of

BARE = [*TINY[2:], "--unlabelled", "--loss", "rkd:1"]
"""TINY without its --dataset."""


@pytest.fixture(scope="module")
def pile(image_folder, tmp_path_factory):
    """The images of all classes in one folder and one below it, without their classes."""
    folder = tmp_path_factory.mktemp("pile") / "images"
    (folder / "deeper").mkdir(parents=True)
    for k, file in enumerate(sorted(image_folder.rglob("*.png"))):
        shutil.copy(file, folder / ("deeper" if k % 3 else ".") / f"{file.parent.name}-{file.name}")
    return folder


@pytest.fixture(scope="module")
def array(pile, teacher_run, tmp_path_factory):
    """What `metric-kd embed` writes."""
    file = tmp_path_factory.mktemp("array") / "e.npy"
    torch.set_num_threads(int(THREADS))
    embed([str(teacher_run), "--images", str(pile), "--out", str(file)])
    return file


def result(run) -> float:
    lines = (run / "result.txt").read_text().splitlines()
    assert lines[-1].startswith("Final neighbours@10 shared with the teacher: ")
    return float(lines[-1].split(": ")[1].split()[0]) / 100


def oracle(student: np.ndarray, teacher: np.ndarray, k: int = 10) -> float:
    """By sorting all distances, image by image."""

    def near(x, n):
        gaps = [(np.linalg.norm(x[n] - x[m]), m) for m in range(len(x)) if m != n]
        return {m for _, m in sorted(gaps)[:k]}

    return float(np.mean([len(near(student, n) & near(teacher, n)) / k for n in range(len(student))]))


def neighbours_shared(student, teacher):
    return share_of(neighbours_of(student), neighbours_of(teacher))


def test_neighbours_shared():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(40, 6)).astype(np.float32), draw.normal(size=(40, 3)).astype(np.float32)
    value = neighbours_shared(torch.from_numpy(one), torch.from_numpy(other))
    assert value == pytest.approx(oracle(one, other)) and 0.15 < value < 0.4, "chance is 10/39"
    turned = torch.linalg.qr(torch.from_numpy(draw.normal(size=(6, 6)).astype(np.float32)))[0]
    assert neighbours_shared(3 * torch.from_numpy(one) @ turned + 1, torch.from_numpy(one)) == 1
    with pytest.raises(UserError, match="10 images have no 10 neighbours"):
        neighbours_shared(torch.zeros(10, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="not of the same images"):
        neighbours_shared(torch.from_numpy(one), torch.from_numpy(other[:30]))


@pytest.mark.parametrize("count, held", [(24, 12), (64, 32), (120, 50), (1000, 100), (30000, 2000)])
def test_what_is_held_out(count, held):
    labels = np.zeros(count, dtype=np.int64)
    records = ImageRecords("folder", labels, ("",), paths=tuple(f"{k:05d}.png" for k in range(count)))
    fit, kept = hold_out(records)
    assert len(kept) == held and set(fit.paths).isdisjoint(kept.paths) and len(fit) + held == count
    gaps = np.diff([int(path[:5]) for path in kept.paths])
    assert gaps.max() - gaps.min() <= 1, "at equal distances"
    assert hold_out(records)[1].paths == kept.paths


def test_too_few_images():
    records = ImageRecords("folder", np.zeros(21, np.int64), ("",), paths=("x",) * 21)
    with pytest.raises(UserError, match="21 images are too few"):
        hold_out(records)


@pytest.mark.parametrize("teacher", ["live", "cached", "array"])
def test_a_student_learns_how_the_teacher_lays_out_any_folder(teacher, pile, teacher_run, array, tmp_path):
    flags = [*BARE, "--data", str(pile), "--teacher_load", str(array if teacher == "array" else teacher_run)]
    flags += ["--views", "3", "--teacher_cache", str(tmp_path / "c.h5")] if teacher == "cached" else []
    run = tmp_path / "run"
    assert distill([*flags, "--epochs", "6", "--save_dir", str(run)]) == 0
    _, held = hold_out(
        ImageRecords("x", np.zeros(64, np.int64), ("",), paths=tuple(sorted(map(str, pile.rglob("*.png")))))
    )
    ours, theirs = (load(str(path)).embed(list(held.paths)) for path in (run, teacher_run))
    assert result(run) == pytest.approx(oracle(ours, theirs), abs=2e-3)
    before = load(str(start_of(flags, tmp_path))).embed(list(held.paths))
    assert oracle(ours, theirs) > oracle(before, theirs) + 0.1, "it learns"
    card = json.loads((run / "card.json").read_text())
    assert card["data"]["train"][0] == 32 and card["data"]["test"][0] == 32
    assert "classes" not in read_checkpoint(run)


def start_of(flags, tmp_path):
    """The student as it begins: a run of next to no learning rate."""
    run = tmp_path / "start"
    distill([*flags, "--epochs", "1", "--lr", "1e-12", "--save_dir", str(run)])
    return run


@pytest.mark.parametrize("teacher", ["live", "cached", "array"])
def test_selection_on_other_held_out_images(teacher, pile, teacher_run, array, tmp_path, capsys):
    flags = [*BARE, "--data", str(pile), "--teacher_load", str(array if teacher == "array" else teacher_run)]
    flags += ["--views", "2", "--teacher_cache", str(tmp_path / "c.h5")] if teacher == "cached" else []
    assert distill([*flags, "--select", "val", "--save_dir", str(tmp_path / "run")]) == 0
    assert "selected on held-out training images" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= record["val_neighbours@10"] <= 1 and "neighbours@10" not in record


def test_batches_are_shuffled_passes_shared_by_processes(pile, teacher_run, monkeypatch):
    flags = [*BARE, "--data", str(pile), "--teacher_load", str(teacher_run)]
    flags = flags[: flags.index("--iter_per_epoch")] + flags[flags.index("--iter_per_epoch") + 2 :]
    parsed = checked(parse("distill", flags))
    assert parsed.config.iter_per_epoch is None and parsed.config.dataset == "folder"
    assert checked(parsed).config == parsed.config, "a run's config.yaml means the run"
    session = build(parsed)
    whole = make_batches(session).epoch(1)
    assert [len(rows) for rows in whole] == [12, 12], "a pass through 32 images, without the few that are left"
    assert len(set(np.concatenate(whole).tolist())) == 24
    shares = []
    for rank in range(2):
        monkeypatch.setattr("metric_kd.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("metric_kd.distributed.world_size", lambda: 2)
        shares.append(make_batches(session).epoch(1))
    for rows, *parts in zip(whole, *shares, strict=True):
        assert np.array_equal(np.concatenate(parts), rows)


def test_killed_and_resumed_gives_the_same_weights(pile, array, tmp_path, monkeypatch):
    flags = [*BARE, "--data", str(pile), "--teacher_load", str(array), "--save_minutes", "0"]
    distill([*flags, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        kill_at(6, patch)
        with pytest.raises(Killed):
            distill([*flags, "--save_dir", str(tmp_path / "cut")])
    distill([*flags, "--save_dir", str(tmp_path / "cut")])
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_a_pack_serves_the_folder(pile, teacher_run, tmp_path):
    data = shutil.copytree(pile, tmp_path / "images")
    flags = [*BARE, "--data", str(data), "--teacher_load", str(teacher_run)]
    distill([*flags, "--save_dir", str(tmp_path / "files")])
    distill([*flags, "--save_dir", str(tmp_path / "packed"), "--pack", "auto"])
    assert same(tmp_path / "files", tmp_path / "packed")
    assert [name for name in os.listdir(data / ".packs") if name.endswith(".h5")]


def test_a_dry_run_counts_images(pile, array, tmp_path, capsys):
    flags = [*BARE, "--data", str(pile), "--teacher_load", str(array), "--save_dir", str(tmp_path / "run"), "--dry_run"]
    assert distill(flags) == 0
    text = capsys.readouterr().out
    assert "data: 32 training images, 32 held out" in text and "vectors of length 16, one for each image" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--loss", "l2_triplet:1"], "loss 'l2_triplet' reads labels, which --unlabelled does not have"),
        (["--loss", "contrastive:1"], "loss 'contrastive' reads labels"),
        (["--loss", "cross_entropy:1"], "loss 'cross_entropy' reads labels"),
        (["--loss", "crd:1"], "loss 'crd' reads labels"),
        (["--triplet_ratio", "1"], "loss 'l2_triplet' reads labels"),
        (["--task", "classification"], "leave --task classification out"),
        (["--classifier", "true"], "leave --classifier out"),
        (["--train_classes", "3"], "leave --train_classes out"),
        (["--metrics", "nmi"], "leave --metrics out"),
        (["--recall", "1", "5"], "leave --recall out"),
        (["--labels", "coarse"], "leave --labels out"),
        (["--mutual", "resnet8"], "leave --mutual out"),
        (["--imitate", "conv"], "leave --imitate out"),
        (["--select", "test"], "give --select val"),
        (["--dataset", "cub200"], "leave --dataset cub200 out"),
    ],
)
def test_what_needs_labels_is_refused(more, sentence):
    words = ["--unlabelled", "--dataset", "folder", "--teacher_load", "x", *more]
    words += [] if "--imitate" in more else ["--dist_ratio", "1"]
    sentences = refusals(fold(parse("distill", words).config))
    assert any(sentence in text for text in sentences), sentences
    assert all(text.endswith(".") and "\n" not in text for text in sentences)


def test_refusals_leave_nothing_behind(pile, teacher_run, array, tmp_path, capsys):
    def refused(*flags, data=pile, teacher=teacher_run):
        words = [*BARE, "--data", data, "--teacher_load", teacher, "--save_dir", tmp_path / "never", *flags]
        assert run_command(distill, list(map(str, words)), "run_distill.py") == 2
        assert not (tmp_path / "never").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "reads labels" in refused("--loss", "l2_triplet:1")
    (tmp_path / "few").mkdir()
    shutil.copy(next(pile.glob("*.png")), tmp_path / "few")
    assert "1 images are too few" in refused(data=tmp_path / "few")
    assert "reads the teacher's maps, and --teacher_load" in refused("--loss", "at:1", teacher=array)
    assert "does not exist" in refused(teacher=tmp_path / "none.npy")
    shutil.copy(array, tmp_path / "alone.npy")
    assert "has no " in refused(teacher=tmp_path / "alone.npy", data=tmp_path / "before any image is looked for")
    assert "fitnet" in refused("--loss", "fitnet:1", teacher=array)
    assert "reads the teacher's logits" in refused("--loss", "st:1", teacher=array)


def test_other_commands_and_a_run_without_labels(pile, image_folder, array, tmp_path, capsys):
    run = tmp_path / "run"
    distill([*BARE, "--data", str(pile), "--teacher_load", str(array), "--epochs", "1", "--save_dir", str(run)])

    def said(*words, status):
        capsys.readouterr()
        assert console(list(map(str, words))) == status
        text = capsys.readouterr()
        return (text.err if status else text.out).strip().splitlines()[-1]

    assert "was trained without labels, so its images have none" in said("eval", run, status=2)
    assert "Recall@1: " in said("eval", run, "--dataset", "folder", "--data", image_folder, status=0)
    assert "holds embeddings, which have no layers" in said("analyse", run, status=2)
    assert "has no test images" in said("analyse", run, "--against", run, status=2)
    assert f"as in --images {pile}" in said("quantify", "--distilled", run, status=2)


# --- an array as the teacher of labelled images ---


def labelled(image_folder, file, run, *more):
    return [*TINY, "--data", str(image_folder), "--teacher_load", str(file), "--save_dir", str(run), *more]


def test_an_array_teaches_what_its_network_would_of_the_test_view(
    image_folder, teacher_run, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "e.npy"
    embed([str(teacher_run), "--images", str(image_folder), "--out", str(file)])
    flags = labelled(image_folder, file, tmp_path / "run", "--loss", "rkd:1", "--epochs", "1")
    session = build(checked(parse("distill", flags)))
    batch = next(iter(session.train.train([np.array([9, 0, 31])], 1)))
    paths = [session.train.records.paths[row] for row in (9, 0, 31)]
    said = session.teacher.outputs_of(batch, ("embedding",)).embedding.numpy()
    np.testing.assert_allclose(said, load(str(teacher_run)).embed(paths), atol=1e-6)
    assert batch.teacher_images is None and batch.images.shape[-1] == 32
    assert distill(flags) == 0
    assert "one for each image, whatever crop of it the student sees" in capsys.readouterr().out
    digest = json.loads((tmp_path / "run" / "card.json").read_text())["environment"]["teacher"]
    # Another order of the same rows is the same teacher; only its digest is another.
    values, rows = np.load(file), list(csv.reader(file.with_suffix(".csv").open()))
    np.save(tmp_path / "r.npy", values[::-1])
    with (tmp_path / "r.csv").open("w", newline="") as table:
        csv.writer(table).writerows([rows[0], *rows[:0:-1]])
    distill([*flags, "--teacher_load", str(tmp_path / "r.npy"), "--save_dir", str(tmp_path / "again")])
    assert same(tmp_path / "run", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "card.json").read_text())["environment"]["teacher"] != digest
    np.save(tmp_path / "r.npy", values)
    distill([*flags, "--teacher_load", str(tmp_path / "r.npy"), "--save_dir", str(tmp_path / "wrong")])
    assert not same(tmp_path / "run", tmp_path / "wrong"), "it matters which vector is whose"


def test_only_training_images_need_vectors(image_folder, tmp_path, capsys):
    names = [str(path.relative_to(image_folder)) for path in sorted(image_folder.rglob("*.png"))]
    file = tmp_path / "e.npy"

    def write(kept):
        np.save(file, np.random.default_rng(0).normal(size=(len(kept), 5)).astype(np.float16))
        file.with_suffix(".csv").write_text("\n".join(["path", *kept]) + "\n")

    write(names[:32])
    flags = labelled(image_folder, file, tmp_path / "run", "--loss", "rkd:1", "--epochs", "1")
    assert distill(flags) == 0, "the first four classes train"
    assert torch.isfinite(weights(tmp_path / "run")["linear.weight"]).all()
    write([*names[:7], *names[9:32]])
    capsys.readouterr()
    assert run_command(distill, [*flags[:-1], "2"], "x") == 2
    text = capsys.readouterr().err
    assert "class00/07.png (2 of 32 images have none)" in text


def test_images_in_memory_have_no_paths(tmp_path):
    from metric_kd.cli.teacher_cache import _rows
    from metric_kd.data.vectors import Vectors

    records = ImageRecords("drawn", np.zeros(2, np.int64), ("a",), pixels=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="in memory and have no paths"):
        _rows(Vectors(tmp_path / "e.npy", np.zeros((2, 3)), ("a", "b")), records, str(tmp_path))
