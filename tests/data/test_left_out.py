"""Every file below a folder is an image, lies beside images by its kind, or is counted."""

import os
import warnings

import pytest
from PIL import Image

from metric_kd.data import load_dataset
from metric_kd.data.folder import images_in, unlabelled
from metric_kd.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for label in "abcd":
        (tmp_path / label).mkdir()
        for name in ("1.jpg", "2.PNG"):
            Image.new("RGB", (4, 4)).save(tmp_path / label / name)
    return tmp_path


def names(paths, root):
    return [os.path.relpath(path, root) for path in paths]


def test_the_endings_of_known_formats_are_read(photos):
    image = Image.new("RGB", (4, 4))
    more = {"3.jfif": "JPEG", "4.JPE": "JPEG", "5.avif": "AVIF", "6.dib": "DIB", "7.pnm": "PPM", "8.jp2": "JPEG2000"}
    for name, kind in more.items():
        image.save(photos / "a" / name, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = images_in(photos)
    assert names(found, photos)[:8] == ["a/1.jpg", "a/2.PNG", *(f"a/{name}" for name in more)] and len(found) == 14


def test_other_files_are_counted_in_one_sentence(photos):
    for name in ("a/1.heic", "a/2.HEIC", "b/1.cr2", "b/film"):
        (photos / name).write_bytes(b"x")
    for name in ("a/Thumbs.db", "a/desktop.ini", "a/.DS_Store", "b/notes.txt", "b/labels.csv", "b/._1.heic"):
        (photos / name).write_bytes(b"x")
    words = r"4 files were left out, .*: 2 \.heic, 1 without an ending, 1 \.cr2\."
    for read in (images_in, unlabelled, lambda root: load_dataset("folder", root)):
        with pytest.warns(UserWarning, match=words) as caught:
            read(photos)
        assert len(caught) == 1
    (photos / "raw").mkdir()
    (photos / "raw" / "1.dng").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no images that can be read, but 1 \.dng; give another folder"):
        images_in(photos / "raw")


def test_folders_of_systems_are_no_classes(photos):
    before = load_dataset("folder", photos)
    for name in ("@eaDir", "__MACOSX", ".thumbnails", "lost+found", "#recycle", "$RECYCLE.BIN", ".ipynb_checkpoints",
                 "System Volume Information", "a/@eaDir"):  # fmt: skip
        (photos / name).mkdir()
        Image.new("RGB", (4, 4)).save(photos / name / "1.jpg")
    (photos / "a" / "._1.jpg").write_bytes(b"x")
    after = load_dataset("folder", photos)
    assert after.train.paths == before.train.paths and after.test.paths == before.test.paths
    assert len(images_in(photos)) == 8


def test_links_that_lead_round_do_not_hang(photos):
    before = load_dataset("folder", photos)
    (photos / "round").symlink_to(photos)
    (photos / "above").symlink_to(photos.parent)
    (photos / "itself").symlink_to(photos / "itself")
    (photos / "a" / "round").symlink_to(photos / "a")
    after = load_dataset("folder", photos)
    assert after.train.paths == before.train.paths and after.test.paths == before.test.paths
    assert len(images_in(photos)) == len(unlabelled(photos)) == 8
    (photos / "e").symlink_to(photos / "a")  # a class that lies elsewhere is one
    assert "e" in load_dataset("folder", photos).test.class_names
