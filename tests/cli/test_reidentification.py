"""A small tree in the layout of Market-1501 goes through training, selection and evaluation."""

import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from metric_kd.cli.distill import main as distill
from metric_kd.cli.granularity import main as granularity
from metric_kd.cli.train import main as train
from metric_kd.data import market1501
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.errors import UserError


@pytest.fixture
def market(tmp_path, monkeypatch):
    """12 people on two cameras, six of them to train on; distractors and junk in the gallery."""
    root = tmp_path / "Market-1501-v15.09.15"
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (13, 4, 2, 3)).repeat(8, 1).repeat(8, 2)

    def write(part, person, camera, shot):
        noisy = np.clip(patterns[max(person, 0)] + generator.normal(0, 30, (32, 16, 3)), 0, 255).astype(np.uint8)
        name = f"{person:04d}" if person >= 0 else "-1"
        (root / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(root / part / f"{name}_c{camera}s1_{shot:06d}_01.jpg")

    for person in range(1, 13):
        for camera in (1, 2):
            for shot in range(3):
                write("bounding_box_train" if person <= 6 else "bounding_box_test", person, camera, shot)
            if person > 6:
                write("query", person, camera, 9)
    for person in (0, -1):
        for shot in range(3):
            write("bounding_box_test", person, 1, shot)
    monkeypatch.setattr(market1501, "TRAIN", (36, 6))
    monkeypatch.setattr(market1501, "QUERY", (12, 6))
    monkeypatch.setattr(market1501, "GALLERY", (39, 7))
    return tmp_path


@pytest.mark.parametrize("select", ["last", "val"])
def test_market_trains_and_is_measured_across_cameras(market, tmp_path, select, capsys):
    run = tmp_path / "run"
    flags = [*TINY, "--dataset", "market1501", "--data", str(market), "--input_size", "32", "--select", select]
    assert train([*flags, "--save_dir", str(run)]) == 0
    text = (run / "result.txt").read_text()
    assert text.startswith("Best Rank-1:") and "Best mAP:" in text and "Best Recall@1:" in text
    capsys.readouterr()
    assert train(["--mode", "eval", "--load", str(run)]) == 0
    shown = capsys.readouterr().out
    assert text.splitlines()[0].split(" ")[2] in shown and "Rank-10:" in shown


def test_the_recipe_of_mag_with_rkd_runs_across_cameras(market, tmp_path):
    """An embedding without a classifier has codes, but no logits for a stable target."""
    data = ["--dataset", "market1501", "--data", str(market)]
    teacher, coders, student = (str(tmp_path / name) for name in ("teacher", "coders", "student"))
    assert train([*TINY, *data, "--input_size", "32", "--epochs", "1", "--save_dir", teacher]) == 0
    brief = ["--epochs", "1", "--batch", "12", "--device", "cpu"]
    assert granularity(["--teacher_load", teacher, "--save_dir", coders, *brief]) == 0
    assert "Rank-1 of the abstract decoder" in (tmp_path / "coders" / "result.txt").read_text()
    taught = [
        *TINY,
        *data,
        "--input_size",
        "32",
        "--epochs",
        "1",
        "--teacher_load",
        teacher,
        "--granularity_load",
        coders,
    ]
    losses = ["--dist_ratio", "1", "--angle_ratio", "2", "--triplet_ratio", "1", "--triplet_sample", "hard"]
    assert distill([*taught, *losses, "--granularity", "mag", "--save_dir", student]) == 0
    assert "Best mAP:" in (tmp_path / "student" / "result.txt").read_text()
    with pytest.raises(UserError, match="give; use --granularity mag"):
        distill([*taught, *losses, "--loss", "st:1", "--granularity", "mas", "--save_dir", str(tmp_path / "mas")])


def test_the_recipe_of_mas_with_rkd_runs_across_cameras(market, tmp_path):
    """Teacher, coders and student of examples/market1501.sh: embeddings with a classifier of the training people beside."""
    data = [*TINY, "--dataset", "market1501", "--data", str(market), "--input_size", "32", "--epochs", "1"]
    data += ["--classifier", "true", "--loss", "cross_entropy:1"]
    teacher, coders, student = (str(tmp_path / name) for name in ("teacher", "coders", "student"))
    assert train([*data, "--loss", "l2_triplet:1,sample=hard", "--save_dir", teacher]) == 0
    stored = read_checkpoint(teacher)
    assert stored["network"]["num_classes"] == 6 and len(stored["classes"]) == 6
    assert granularity(["--teacher_load", teacher, "--save_dir", coders, "--epochs", "1", "--batch", "12"]) == 0
    assert read_checkpoint(coders)["coders"]["decodes"] == "logits"
    taught = [*data, "--teacher_load", teacher, "--granularity", "mas", "--granularity_load", coders]
    assert distill([*taught, "--loss", "st:0.8", "--dist_ratio", "1", "--angle_ratio", "2", "--save_dir", student]) == 0
    assert "Best mAP:" in (tmp_path / "student" / "result.txt").read_text()
    assert train(["--mode", "eval", "--load", student]) == 0
