"""Files that version 0.1.0 wrote before the layout changed still open: runs, a cache, a pack, an index, an exported file."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import metric_kd
from metric_kd.cli.main import main
from metric_kd.deploy.exported import Exported

WRITTEN = Path(__file__).parent / "golden" / "written_0_1"
MADE = 1_700_000_000
"""When the photos were last changed, which a pack looks at."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path / "written")
    for photo in (tmp_path / "written/photos").rglob("*.png"):
        os.utime(photo, (MADE, MADE))
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


@pytest.fixture
def said(capsys):
    """Run a command, which must end well, and give what it said."""

    def call(*words):
        capsys.readouterr()
        status = main([*map(str, words)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out + err

    return call


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_a_run_is_measured_as_when_it_was_made(run, folder, said):
    measured = said("eval", run)
    best = [line.split(": ") for line in (folder / run / "result.txt").read_text().splitlines() if "Best" in line]
    assert len(best) == 2
    for name, value in best:
        assert f"{name.removeprefix('Best ')}: {value.split(' ')[0]}" in measured


def test_a_run_is_resumed_with_its_teachers_answers(folder, said):
    before = (folder / "teacher.cache").read_bytes()
    text = said("distill", "--config", "student/config.yaml", "--epochs", 3)
    assert "resuming student at epoch 3" in text
    assert len((folder / "student/metrics.jsonl").read_text().splitlines()) == 3
    assert (folder / "teacher.cache").read_bytes() == before, "they are read, not asked for again"


def test_a_finished_run_is_finished(folder, said):
    assert "teacher is finished" in said("train", "--config", "teacher/config.yaml")


def test_a_pack_gives_the_images(folder, said):
    text = said("train", "--config", "teacher/config.yaml", "--save_dir", "packed", "--pack", "photos.h5")
    assert "images come from photos.h5" in text


def test_an_index_and_an_exported_file_give_the_vectors_of_the_run(folder, said):
    photos = sorted((folder / "photos").rglob("*.png"))
    vectors = metric_kd.load(folder / "student").embed(photos)
    assert vectors.shape == (16, 8) and np.isfinite(vectors).all()
    found = metric_kd.Searcher("photos.index").search(photos, k=1)
    assert [Path(hits[0].path).name for hits in found] == [photo.name for photo in photos]
    assert max(hits[0].distance for hits in found) < 1e-3
    np.testing.assert_allclose(Exported(folder / "student.onnx").embed(photos), vectors, atol=1e-4)


def test_a_report_of_both(folder, said):
    said("report", "teacher", "student", "--out", "page.html", "--map", "none", "--images", 0)
    assert "student" in (folder / "page.html").read_text()
