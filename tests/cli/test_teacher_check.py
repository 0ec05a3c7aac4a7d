"""--teacher_check: every doubt is said, none is invented, and the run is bit for bit that without."""

import shutil

import numpy as np
import pytest
import torch
from killing import history, same
from tiny import TINY, write_images

from metric_kd.cli.config import COMMANDS
from metric_kd.cli.distill import main as distill
from metric_kd.cli.embed import main as embed
from metric_kd.cli.teacher_check import of_embeddings
from metric_kd.losses.objective import parse_loss


def flags(data, teacher, run, *more):
    return [*TINY, "--data", str(data), "--teacher_load", str(teacher), "--save_dir", str(run), "--dist_ratio", "1",
            *map(str, more)]  # fmt: skip


def drawn(count=300, width=32, rank=32, scale=1.0):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(count, rank, generator=draw) @ torch.linalg.qr(torch.randn(width, rank, generator=draw))[0].T
    return scale * x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rank, says", [(32, False), (8, False), (3, True), (1, True)])
def test_collapsed_dimensions(rank, says):
    found = of_embeddings(drawn(rank=rank), [parse_loss("rkd_distance:1")], True)
    assert [("of their 32 dimensions" in sentence) for sentence in found] == [True] * says
    few = of_embeddings(drawn(count=5), [parse_loss("rkd_distance:1")], True)
    assert few == [], "four directions are all that five images can show"


def test_embeddings_that_are_not_finite():
    vectors = drawn()
    vectors[3, 5], vectors[7], vectors[7, 0] = float("nan"), float("inf"), float("nan")
    found = of_embeddings(vectors, [parse_loss("dark_rank:1")], False)
    assert found == [
        "the teacher's embeddings of 2 of 300 training images are not finite; look at how the teacher was trained"
    ]


@pytest.mark.parametrize(
    "loss, normalised, says",
    [
        ("rkd_distance:1", False, False),
        ("dark_rank:1", False, True),
        ("dark_rank:1", True, False),
        ("dark_rank:1,normalise=true", False, False),
        ("dark_rank:0", False, False),
        ("regression:1,distance=euclidean", True, True),
        ("regression:1", False, False),
    ],
)
def test_scale(loss, normalised, says):
    spec = [parse_loss(loss)]
    for scale, far in ((1.0, False), (40.0, True), (0.01, True)):
        found = of_embeddings(drawn(scale=scale), spec, normalised)
        assert bool(found) == (says and far)
        assert all("apart on average" in sentence and spec[0].name in sentence for sentence in found)


def test_images_that_are_there_twice(teacher_run, tmp_path, capsys):
    data = write_images(tmp_path / "data", 8, 8)
    distill(flags(data, teacher_run, tmp_path / "clean", "--epochs", 1))
    assert "training image" not in capsys.readouterr().out
    shutil.copy(data / "class00" / "00.png", data / "class00" / "90.png")
    shutil.copy(data / "class00" / "01.png", data / "class03" / "90.png")
    shutil.copy(data / "class02" / "03.png", data / "class06" / "90.png")
    distill(flags(data, teacher_run, tmp_path / "run", "--epochs", 1))
    said = capsys.readouterr().out
    assert "2 of 34 training images repeat another one, 1 of them under another class" in said
    assert "1 of 33 test images are training images too" in said and "class06/90.png is " in said
    distill(flags(data, teacher_run, tmp_path / "quiet", "--epochs", 1, "--teacher_check", "false"))
    assert "warning" not in capsys.readouterr().out
    assert same(tmp_path / "run", tmp_path / "quiet") and history(tmp_path / "run") == history(tmp_path / "quiet")


def test_a_teacher_of_vectors_and_a_cache_are_looked_at_too(image_folder, teacher_run, tmp_path, capsys):
    file = tmp_path / "vectors.npy"
    embed([str(teacher_run), "--images", str(image_folder), "--out", str(file)])
    np.save(file, np.load(file)[:, :1].repeat(16, 1))
    capsys.readouterr()
    distill(flags(image_folder, file, tmp_path / "array", "--epochs", 1))
    assert "use about 1.0 of their 16 dimensions" in capsys.readouterr().out
    cached = ["--views", 2, "--teacher_cache", tmp_path / "cache.h5", "--epochs", 1]
    distill(flags(image_folder, teacher_run, tmp_path / "cached", *cached))
    assert "training into" in capsys.readouterr().out
    assert COMMANDS["distill"](teacher_load="x").teacher_check


def test_a_resumed_run_is_not_looked_at_again(teacher_run, tmp_path, capsys):
    data = write_images(tmp_path / "data", 8, 8)
    shutil.copy(data / "class00" / "00.png", data / "class00" / "90.png")
    distill(flags(data, teacher_run, tmp_path / "run", "--epochs", 1))
    assert "repeat another one" in capsys.readouterr().out
    distill(flags(data, teacher_run, tmp_path / "run", "--epochs", 2))
    said = capsys.readouterr().out
    assert "resuming" in said and "repeat another one" not in said
