"""STL-10 and Tiny ImageNet from small trees with their layout."""

import numpy as np
import pytest

from metric_kd.data import load_dataset
from metric_kd.data.stl10 import CLASSES
from metric_kd.errors import UserError


def write_stl10(folder, train=20, test=10):
    """Image k of a part is red from left to right, green from top to bottom, and k + its label in blue."""
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        rows, columns = np.mgrid[:96, :96].astype(np.uint8)
        for k in range(count):
            blue = np.full((96, 96), k + labels[k], dtype=np.uint8)
            with open(folder / f"{part}_X.bin", "ab") as file:
                for plane in (columns, rows, blue):
                    file.write(plane.tobytes(order="F"))  # column by column, as published
        (labels + 1).tofile(folder / f"{part}_y.bin")
    return folder


@pytest.mark.parametrize("where", [".", "stl10_binary", "stl10/stl10_binary"])
def test_stl10(tmp_path, where):
    write_stl10(tmp_path / where) if where != "." else write_stl10(tmp_path / "here")
    root = tmp_path / "here" if where == "." else tmp_path
    train, test = load_dataset("stl10", root, task="classification", download=False)
    assert train.class_names == test.class_names == CLASSES
    assert train.pixels.shape == (20, 96, 96, 3) and test.pixels.shape == (10, 96, 96, 3)
    assert train.labels.tolist() == [k % 10 for k in range(20)]
    red, green, blue = np.moveaxis(train.pixels[13], -1, 0)
    assert (red == np.arange(96)).all() and (green == np.arange(96)[:, None]).all() and (blue == 16).all()
    assert train.pixels.flags.c_contiguous and train.mean == (0.4468, 0.4399, 0.4068)


def test_stl10_by_class_and_some_classes(tmp_path):
    write_stl10(tmp_path / "stl10_binary")
    train, test = load_dataset("stl10", tmp_path, download=False)
    assert (train.class_names, test.class_names) == (CLASSES[:5], CLASSES[5:])
    train, test = load_dataset("stl10", tmp_path, task="classification", train_classes=["cat", "dog"], download=False)
    assert train.class_names == test.class_names == ("cat", "dog") and len(train) == 4 and len(test) == 2


def test_broken_stl10_is_refused(tmp_path):
    folder = write_stl10(tmp_path / "stl10_binary")

    def refused(match):
        with pytest.raises(UserError, match=match):
            load_dataset("stl10", tmp_path, task="classification", download=False)

    whole = (folder / "test_X.bin").read_bytes()
    (folder / "test_X.bin").write_bytes(whole[:-1000])
    refused(r"10 classes in test_y.bin and 10.0 images")
    (folder / "test_X.bin").write_bytes(whole)
    np.arange(10, dtype=np.uint8).tofile(folder / "test_y.bin")
    refused("holds no classes 1 to 10")
    (folder / "test_y.bin").unlink()
    refused("cannot read .*test_y.bin")
    (folder / "train_X.bin").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="stl10_binary.tar.gz is missing; get it from"):
        load_dataset("stl10", tmp_path / "empty", task="classification", download=False)


WNIDS = ("n01443537", "n02123045", "n03444034")


@pytest.fixture
def tiny_tree(tmp_path, picture):
    """Three classes with four training images each; five validation images, in an order of their own."""
    folder = tmp_path / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        for k in range(4):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", (64, 64), seed=10 * c + k)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t62\t62\n")
    lines = []
    for k, c in enumerate((2, 0, 1, 1, 2)):
        picture(folder / "val" / "images" / f"val_{k}.JPEG", (64, 64), seed=100 + k)
        lines.append(f"val_{k}.JPEG\t{WNIDS[c]}\t0\t32\t44\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(folder / "test" / "images" / "test_0.JPEG", (64, 64))
    return folder


def test_tinyimagenet(tiny_tree):
    for root in (tiny_tree, tiny_tree.parent):
        train, test = load_dataset("tinyimagenet", root, task="classification", download=False)
        assert train.class_names == test.class_names == WNIDS
        assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and test.labels.tolist() == [2, 0, 1, 1, 2]
        assert [path.rsplit("/", 1)[1] for path in test.paths] == [f"val_{k}.JPEG" for k in range(5)]
        assert test.mean == train.mean == (0.480, 0.448, 0.398)
    train, test = load_dataset("tinyimagenet", tiny_tree, download=False)
    assert (train.class_names, test.class_names) == (WNIDS[:1], WNIDS[1:])


@pytest.mark.parametrize(
    "text, match",
    [
        ("val_0.JPEG\tn99999999\t0\t0\t1\t1\n", "names no image and class of train/"),
        ("word\n", "names no image"),
        ("", "is empty"),
    ],
)
def test_broken_annotations_are_refused(tiny_tree, text, match):
    (tiny_tree / "val" / "val_annotations.txt").write_text(text)
    with pytest.raises(UserError, match=match):
        load_dataset("tinyimagenet", tiny_tree, task="classification", download=False)
