"""A tree like the published one, with everything in it that the names can say."""

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metric_kd.data import Geometry, ImageLoader, ImageRecords, hold_out_classes, load_dataset, market1501
from metric_kd.errors import UserError

TRAIN = [f"{person:04d}_c{camera}s1_00{camera}451_03.jpg" for person in (2, 7, 10, 11) for camera in (1, 6)]
QUERY = ["0001_c1s1_001051_00.jpg", "0001_c2s1_000301_00.jpg", "0003_c5s3_015240_00.jpg"]
GALLERY = ["0001_c1s1_001051_01.jpg", "0001_c3s2_000001_02.jpg", "0003_c4s6_000002_01.jpg", "0003_c5s3_015241_02.jpg"]
DISTRACTORS = ["0000_c1s1_000151_01.jpg", "0000_c6s4_002427_03.jpg"]
JUNK = ["-1_c1s1_000401_03.jpg", "-1_c3s1_000401_03.jpg"]
STRAY = ["Thumbs.db", "._0001_c1s1_001051_01.jpg"]


def names():
    """All paths below the folder of the archive."""
    parts = {
        "bounding_box_train": TRAIN,
        "query": QUERY,
        "bounding_box_test": [*GALLERY, *DISTRACTORS, *JUNK, *STRAY],
        "gt_query": ["0001_c1s1_001051_00_good.mat"],
        "gt_bbox": GALLERY,
    }
    return [f"{part}/{name}" for part, files in parts.items() for name in files] + ["readme.txt"]


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(market1501, "TRAIN", (8, 4))
    monkeypatch.setattr(market1501, "QUERY", (3, 2))
    monkeypatch.setattr(market1501, "GALLERY", (6, 3))


@pytest.fixture
def tree(tmp_path, picture):
    """tree(where): the published layout below where, upright images in it."""

    def make(where="."):
        folder = tmp_path / where
        for k, name in enumerate(names()):
            if name.endswith(".jpg") and "._" not in name:
                picture(folder / name, (6, 12), seed=k)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(b"stray")
        return folder

    return make


def load(root, **options):
    return load_dataset("market1501", root, **options)


def shown(records, rows=slice(None)):
    return [os.path.basename(path) for path in np.array(records.paths)[rows]]


@pytest.mark.parametrize("where", [".", "Market-1501-v15.09.15", "market1501", "market1501/Market-1501-v15.09.15"])
def test_the_published_split(where, tree, tmp_path):
    folder = tree(where)
    train, test = load(tmp_path)
    assert shown(train) == sorted(TRAIN) and train.class_names == ("0002", "0007", "0010", "0011")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and train.cameras.tolist() == [1, 6] * 4
    assert train.query is None and train.gallery is None

    assert shown(test, test.query) == QUERY
    assert shown(test, test.gallery) == sorted(GALLERY + DISTRACTORS), "junk is left out, distractors stay"
    assert not (test.query & test.gallery).any() and len(test) == 9
    for name, label, camera in zip(shown(test), test.labels, test.cameras, strict=True):
        assert (test.class_names[label], camera) == (name[:4], int(name[6]))
    assert test.labels.dtype == test.cameras.dtype == train.cameras.dtype == np.int64
    assert train.flip and test.flip and train.mean is None
    assert all(os.path.isfile(path) for path in train.paths + test.paths)
    again = load(folder)
    assert again.train.paths == train.paths and again.test.fingerprint() == test.fingerprint()


def test_distractors_are_a_class_that_no_query_has(tree):
    test = load(tree()).test
    assert test.class_names == ("0000", "0001", "0003")
    distractor = test.class_names.index("0000")
    assert distractor not in test.labels[test.query]
    assert sorted(shown(test, test.labels == distractor)) == DISTRACTORS


def test_upright_crops_become_squares_and_cameras_stay_with_them(tree):
    train, test = load(tree())
    loader = ImageLoader(test, Geometry(32))
    assert next(loader.test(9)).images.shape == (9, 3, 32, 32)
    np.testing.assert_array_equal(loader.records.cameras, test.cameras)
    Path(test.paths[4]).write_bytes(b"broken")
    skipping = ImageLoader(test, Geometry(32), skip_unreadable=True)
    np.testing.assert_array_equal(skipping.records.cameras, np.delete(test.cameras, 4))
    held = hold_out_classes(train).test
    assert held.cameras.tolist() == [1, 6, 1, 6] and held.class_names == ("0010", "0011")


def archive(file, folder="Market-1501-v15.09.15"):
    with zipfile.ZipFile(file, "w") as zipped:
        for name in names():
            zipped.writestr(f"{folder}/{name}", b"x")
        zipped.writestr("__MACOSX/._readme.txt", b"x")
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("home", [".", "market1501"])
def test_an_archive_put_there_by_hand(home, monkeypatch, tmp_path):
    (tmp_path / home).mkdir(exist_ok=True)
    file = tmp_path / home / "Market-1501-v15.09.15.zip"
    digest = archive(file)
    with pytest.raises(
        UserError, match="instead of 65005ab7.*get it again from its authors .*or unpack it there yourself"
    ):
        load(tmp_path)
    monkeypatch.setattr(market1501, "SOURCE", replace(market1501.SOURCE, md5=digest))
    splits = load(tmp_path)
    assert len(splits.train) == 8 and len(splits.test) == 9
    file.unlink()
    assert load(tmp_path).test.paths == splits.test.paths


def test_where_it_is_missing_nothing_is_downloaded(tmp_path):
    for options in ({}, {"download": True}):
        with pytest.raises(UserError) as caught:
            load(tmp_path, **options)
        for part in (f"{tmp_path} holds no Market-1501", "Market-1501-v15.09.15.zip", "https://", f"into {tmp_path}."):
            assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("part", ["bounding_box_train", "query", "bounding_box_test"])
def test_missing_parts_are_named(part, tree, tmp_path):
    folder = tree()
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=f"has no folder {part}; unpack the whole"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["photo.jpg", "0001.jpg", "0001_c7s1_000001_00.jpg", "12_c1s1_000001_00.jpg", "1_c1s1_0_0.png"]
)
def test_bad_names_are_named(name, tree):
    folder = tree()
    (folder / "bounding_box_test" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} is not named as in Market-1501"):
        load(folder)


def test_only_the_gallery_holds_images_of_nobody(tree):
    folder = tree()
    for part in ("bounding_box_train", "query"):
        for name in (DISTRACTORS[0], JUNK[0]):
            (folder / part / name).write_bytes(b"x")
            with pytest.raises(UserError, match=f"{name} shows no person that was told"):
                load(folder)
            (folder / part / name).unlink()


def test_numbers_are_those_published(tree):
    folder = tree()
    (folder / "query" / QUERY[2]).unlink()
    with pytest.raises(UserError, match="query has 2 images in 1 classes where query of Market-1501 has 3 in 2"):
        load(folder)
    (folder / "bounding_box_test" / "-1_c2s1_000401_03.jpg").write_bytes(b"x")  # junk counts nowhere
    (folder / "query" / QUERY[2]).write_bytes(b"x")
    assert len(load(folder).test) == 9
    (folder / "bounding_box_train" / TRAIN[0]).unlink()
    with pytest.raises(UserError, match="7 images in 4 classes"):
        load(folder)


def test_people_who_train_do_not_test(tree):
    folder = tree()
    (folder / "bounding_box_train" / TRAIN[0]).rename(folder / "bounding_box_train" / "0003_c1s1_000451_03.jpg")
    (folder / "bounding_box_train" / TRAIN[1]).rename(folder / "bounding_box_train" / "0003_c2s1_000451_03.jpg")
    with pytest.raises(UserError, match="'0003' is in bounding_box_train and in a test part"):
        load(folder)


def test_the_published_split_is_the_only_one(tree):
    folder = tree()
    for chosen in (2, ["0002"]):
        with pytest.raises(UserError, match="leave out --train_classes"):
            load(folder, train_classes=chosen)
    with pytest.raises(UserError, match="market1501 has no classification split"):
        load(folder, task="classification")


def test_cameras_are_a_column_like_others():
    records = ImageRecords("r", np.array([0, 1, 1]), ("a", "b"), paths=("x", "y", "z"), cameras=np.array([4, 5, 6]))
    assert records.select(np.array([2, 0])).cameras.tolist() == [6, 4]
    assert records.of_classes(np.array([1])).cameras.tolist() == [5, 6]
    plain = replace(records, cameras=None)
    assert plain.select(np.array([0])).cameras is None
    prints = {r.fingerprint() for r in (records, plain, replace(records, cameras=np.array([4, 5, 5])))}
    assert len(prints) == 3
    with pytest.raises(ValueError, match="one entry per image"):
        replace(records, cameras=np.array([1, 2]))


REAL = Path(os.environ.get("METRIC_KD_TEST_DATA") or "nowhere", "market1501")


@pytest.mark.skipif(not REAL.is_dir(), reason="METRIC_KD_TEST_DATA names no folder with a real market1501/")
def test_real_market1501(monkeypatch):
    monkeypatch.undo()
    train, test = load(REAL)
    assert (len(train), train.num_classes) == (12_936, 751)
    assert (test.query.sum(), test.gallery.sum(), test.num_classes) == (3_368, 15_913, 751)
