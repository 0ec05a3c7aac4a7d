"""`metric_kd.load(run).embed` and `metric-kd embed`: what they take, what they leave out, and what they never write."""

import os
import shutil

import numpy as np
import pytest
import torch
from tiny import write_images

import metric_kd
from metric_kd.cli import embed as embedding
from metric_kd.cli.main import main as console
from metric_kd.deploy.embedder import images_in
from metric_kd.deploy.names import shown
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.errors import UserError


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", classes=2, per_class=2)


def refusal(capsys, run, photos, out):
    capsys.readouterr()
    assert console(["embed", str(run), "--images", str(photos), "--out", str(out)]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("error: ")
    return text


def test_one_image_of_any_kind_and_none_at_all(teacher_run, photos):
    embedder, path = metric_kd.load(teacher_run), images_in(photos)[0]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    wanted = embedder.embed([pixels])
    for one in (pixels, tensor):  # no bits: kernels differ by memory format
        np.testing.assert_allclose(embedder.embed(one), wanted, atol=1e-6)
    assert embedder.embed([]).shape == (0, embedder.dimensions)
    for batch in (0, -1):
        with pytest.raises(UserError, match=f"batch is {batch}; give 1 or more"):
            embedder.embed([path], batch=batch)
    with pytest.raises(UserError, match="one pixel or more"):
        embedder.embed([np.zeros((0, 4, 3), np.uint8)])


def test_images_are_files_that_are_shown(photos, tmp_path):
    right = images_in(photos)
    (photos / "folder.jpg").mkdir()
    for hidden in (".thumbnails", "__MACOSX"):
        shutil.copytree(photos / "class00", photos / hidden)
    (photos / "linked").symlink_to(photos / "class00")
    os.symlink(tmp_path / "gone", photos / "lost.jpg")
    assert images_in(photos) == sorted([*right, str(photos / "lost.jpg")])
    with pytest.raises(UserError, match="^--calibration .* holds no images"):
        images_in(photos / "folder.jpg", "--calibration")


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(photos, monkeypatch):
    def scandir(path):
        if os.fspath(path).endswith("class01"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder .*class01 \(Permission denied\)"):
        images_in(photos)


def test_names_that_its_table_cannot_hold_are_refused_before_anything_is_embedded(
    teacher_run, photos, tmp_path, capsys, monkeypatch
):
    os.rename(photos / "class00" / "00.png", os.fsencode(photos) + b"/\xff.png")
    monkeypatch.setattr(embedding, "load", lambda *_: pytest.fail("the network is not needed"))
    assert "the name of the image \ufffd.png is no UTF-8" in refusal(capsys, teacher_run, photos, tmp_path / "v.npy")


def test_numbers_that_are_not_finite_are_not_written(teacher_run, photos, tmp_path, capsys):
    content = read_checkpoint(teacher_run)
    content.pop("format", None)
    for values in content["model"].values():
        if values.is_floating_point():
            values.view(-1)[0] = torch.nan
    write_checkpoint(tmp_path / "nan.pth", content)
    text = refusal(capsys, tmp_path / "nan.pth", photos, tmp_path / "v.npy")
    assert "the embedding of class00/00.png is not finite, so nothing was written" in text
    assert sorted(os.listdir(tmp_path)) == ["nan.pth", "photos"]


def test_vectors_never_lie_beside_the_names_of_others(teacher_run, photos, tmp_path, monkeypatch):
    out, words = tmp_path / "v.npy", ["embed", str(teacher_run), "--images", str(photos), "--out"]
    assert console([*words, str(out)]) == 0
    (photos / "class00" / "00.png").rename(photos / "class00" / "moved.png")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "write_text", killed)  # a kill between the two files
    assert console([*words, str(out)]) == 130
    assert not out.exists() and (tmp_path / "v.csv").read_text().splitlines()[1] == "class00/00.png"
    monkeypatch.undo()
    assert console([*words, str(out)]) == 0
    assert len(np.load(out)) == len((tmp_path / "v.csv").read_text().splitlines()) - 1
    assert sorted(os.listdir(tmp_path)) == ["photos", "v.csv", "v.npy"]


def test_a_name_is_one_line_that_can_be_printed():
    assert shown("a (1).jpg") == "a (1).jpg" and shown("日本.jpg") == "日本.jpg"
    assert shown(os.fsdecode(b"a\n\x1b\xff.jpg")) == "a\ufffd\ufffd\ufffd.jpg"
