"""`metric-kd export`: a file that is checked, described and whole, or one sentence and no file."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_images

import metric_kd
from metric_kd.cli.evaluate import evaluate
from metric_kd.cli.main import main as metric_kd_main
from metric_kd.cli.parse import parse
from metric_kd.deploy import parity
from metric_kd.deploy.exported import Exported
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint


def export(*words):
    return metric_kd_main(["export", *map(str, words)])


def refusal(capsys, *words):
    assert export(*words) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ") and text[-1] in ".?"
    return text


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for k, size in enumerate([(50, 40), (33, 70), (32, 32)]):
        write_images(folder / str(k), classes=1, per_class=1, size=32, seed=k)
        (path,) = (folder / str(k)).rglob("*.png")
        Image.open(path).resize(size).save(path)
    return folder


def run_the_card(card, folder):
    """What the card's own program gives for a picture, and the picture."""
    program = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    assert len(program.strip().splitlines()) <= 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 53, 3), dtype=np.uint8))
    picture.save(folder / "image.jpg")
    names = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(compile(program, str(card), "exec"), names)
    finally:
        os.chdir(before)
    return np.asarray(names["embedding"]), str(folder / "image.jpg")


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_file_its_card_and_its_recall(form, teacher_run, tmp_path, capsys):
    out = tmp_path / f"t.{form}"
    assert export(teacher_run, "--to", form, "--out", out, "--count", 10) == 0
    said = capsys.readouterr().out
    assert "on 10 images, alone and in batches" in said and "Recall@1 from image files" in said
    card = json.loads(Path(f"{out}.json").read_text())
    reached = evaluate(parse("train", ["--mode", "eval", "--load", str(teacher_run)]))["recall@1"]
    rows = card["export"]["rows"]
    assert len(rows) == 2 and rows[0]["recall@1"] == pytest.approx(reached) and rows[1]["bytes"] == out.stat().st_size
    assert abs(rows[1]["recall@1"] - reached) <= 0.003
    assert card["export"]["parity"]["difference"] <= 1e-4 and card["export"]["parity"]["cosine"] > 0.9999
    assert (
        card["training"]["losses"]
        and card["training"]["data"]["train"][0] == 32
        and card["training"]["teacher"] is None
    )
    embedding, picture = run_the_card(Path(f"{out}.md"), tmp_path)
    assert np.abs(embedding - metric_kd.load(teacher_run).embed([picture])).max() < 0.02
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image.jpg", out.name, f"{out.name}.json", f"{out.name}.md"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_says_what_it_costs(kind, teacher_run, tmp_path, capsys):
    out = tmp_path / "t.onnx"
    assert export(teacher_run, "--to", "onnx", "--int8", kind, "--out", out, "--count", 10) == 0
    said = capsys.readouterr().out
    lost = re.search(
        r"int8 against fp32: ([+-]\d+\.\d\d) points of Recall@1, (0\.\d+) of the size, .* of the time", said
    )
    rows = json.loads(Path(f"{out}.json").read_text())["export"]["rows"]
    assert [row["name"].split(", ")[-1] for row in rows] == ["PyTorch", "fp32", f"int8 {kind}"]
    assert float(lost[1]) == pytest.approx(100 * (rows[2]["recall@1"] - rows[1]["recall@1"]), abs=0.006)
    exported = Exported(out)
    assert exported.metadata["int8"] == kind and rows[2]["bytes"] == out.stat().st_size < rows[1]["bytes"]
    assert parity.recall_at_1(exported, _test_images(teacher_run)) == rows[2]["recall@1"]


def _test_images(run):
    from metric_kd.cli.goals import load_splits
    from metric_kd.cli.session import checked

    return load_splits(checked(parse("train", ["--mode", "eval", "--load", str(run)])).config).test


@pytest.mark.slow
def test_without_the_runs_data_a_folder_of_images_will_do(teacher_run, photos, tmp_path, capsys):
    checkpoint = shutil.copy(teacher_run / "best.pth", tmp_path / "alone.pth")
    assert "Give a folder, as --images DIR" in refusal(capsys, checkpoint, "--to", "onnx")
    moved = tmp_path / "moved"
    shutil.copytree(teacher_run, moved)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(re.sub(r"(?m)^data: .*", f"data: {tmp_path / 'gone'}", config))
    for run, default in ((checkpoint, tmp_path / "alone.onnx"), (moved, moved / "moved.onnx")):
        assert export(run, "--to", "onnx", "--images", photos) == 0
        said = capsys.readouterr().out
        assert "on 3 images" in said and "Recall@1 was not measured: " in said and default.is_file()
    assert "no calibration images" in refusal(capsys, moved, "--to", "onnx", "--images", photos, "--int8", "static")
    words = ("--images", photos, "--int8", "static", "--calibration", photos, "--skip_recall")
    assert export(moved, "--to", "onnx", *words) == 0
    assert "Recall@1 was" not in capsys.readouterr().out and (moved / "moved.int8-static.onnx").is_file()


def test_images_and_weights_that_cannot_serve_are_named(teacher_run, photos, tmp_path, capsys, monkeypatch):
    content = read_checkpoint(teacher_run)
    content.pop("format", None)
    next(iter(content["model"].values())).view(-1)[0] = torch.nan
    write_checkpoint(tmp_path / "nan.pth", content)
    assert "embeddings that are not finite; nothing" in refusal(
        capsys, tmp_path / "nan.pth", "--to", "onnx", "--images", photos
    )
    monkeypatch.setattr("metric_kd.cli.export.WRITERS", {})  # what follows comes before any work
    shutil.copytree(photos, tmp_path / "cut")
    broken = tmp_path / "cut" / "broken.png"
    broken.write_bytes(next(photos.rglob("*.png")).read_bytes()[:100])
    words = (teacher_run, "--to", "onnx", "--out", tmp_path / "t.onnx", "--skip_recall")
    said = refusal(capsys, *words, "--int8", "static", "--images", photos, "--calibration", tmp_path / "cut")
    assert str(broken) in said and said.endswith("; repair or remove it.")
    assert str(broken) in refusal(capsys, *words, "--images", tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    said = refusal(capsys, *words, "--int8", "static", "--calibration", tmp_path / "empty")
    assert said.startswith("error: --calibration ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "empty", "nan.pth", "photos"]


def test_a_file_that_differs_is_not_written(teacher_run, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    out = tmp_path / "t.onnx"
    assert "nothing was written" in refusal(capsys, teacher_run, "--to", "onnx", "--out", out, "--images", photos)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_what_was_there_stays_until_the_new_file_is_whole(teacher_run, photos, tmp_path, monkeypatch):
    out = tmp_path / "t.onnx"
    out.write_bytes(b"old")
    replace = os.replace

    def stop(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    assert export(teacher_run, "--to", "onnx", "--out", out, "--images", photos, "--skip_recall") == 130
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "t.onnx", "t.onnx.json", "t.onnx.md"]


def test_refusals_come_before_any_work(teacher_run, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metric_kd.cli.export.build", lambda *_: pytest.fail("the data was read"))
    (tmp_path / "empty").mkdir()
    plain = tmp_path / "plain.pth"
    torch.save(read_checkpoint(teacher_run)["model"], plain)
    coders = tmp_path / "coders.pth"
    write_checkpoint(coders, {"coders": {}, "model": {}})
    for words, sentence in [
        ([teacher_run, "--to", "tflite"], "--to"),
        ([teacher_run], "required"),
        ([teacher_run, "--to", "pt2", "--int8", "dynamic"], "--int8 is for --to onnx"),
        ([teacher_run, "--to", "onnx", "--int8", "int4"], "--int8"),
        ([teacher_run, "--to", "onnx", "--calibration", image_folder], "--calibration is for --int8 static"),
        ([teacher_run, "--to", "onnx", "--int8", "static", "--calibration", tmp_path / "empty"], "holds no images"),
        ([teacher_run, "--to", "onnx", "--images", tmp_path / "no"], "is no folder"),
        ([teacher_run, "--to", "onnx", "--out", tmp_path / "x.pt2"], "ends in .onnx"),
        ([teacher_run, "--to", "onnx", "--out", tmp_path / "no" / "x.onnx"], "does not exist; create it"),
        ([teacher_run, "--to", "onnx", "--out", "/proc/x.onnx"], "not writable"),
        ([teacher_run, "--to", "onnx", "--count", "0"], "--count is 0"),
        ([teacher_run, "--to", "onnx", "--device", "cuda"], "--device is where a .pt2 file runs"),
        ([tmp_path / "none", "--to", "onnx"], "does not exist"),
        ([plain, "--to", "onnx"], "plain state dict"),
        ([coders, "--to", "onnx"], "coders"),
    ]:
        assert sentence in refusal(capsys, *words), words
    for package in ("onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            said = refusal(capsys, teacher_run, "--to", "onnx")
            assert package in said and "pip install 'metric_kd[export]'" in said
