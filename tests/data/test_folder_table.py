"""Folders of class folders, and CSV tables."""

import os

import numpy as np
import pytest

from metric_kd.data import load_dataset
from metric_kd.errors import UserError


def tree(root, *files):
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def names(records):
    return [os.path.basename(p) for p in records.paths]


def test_class_folders_are_halved_in_sorted_order(tmp_path):
    tree(tmp_path, "b/2.jpg", "b/1.PNG", "a/1.jpeg", "d/1.bmp", "c/x/deep.tif", "c/1.webp", "readme.txt", "a/notes.txt")
    splits = load_dataset("folder", tmp_path)
    assert splits.train.class_names == ("a", "b") and splits.test.class_names == ("c", "d")
    assert names(splits.train) == ["1.jpeg", "1.PNG", "2.jpg"] and splits.train.labels.tolist() == [0, 1, 1]
    assert sorted(names(splits.test)) == ["1.bmp", "1.webp", "deep.tif"] and splits.test.labels.tolist() == [0, 0, 1]
    assert splits.train.flip and not load_dataset("folder", tmp_path, flip=False).test.flip


def test_hidden_files_and_folders_are_not_seen(tmp_path):
    tree(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._3.jpg", "b/1.jpg", ".cache/1.jpg", "b/.thumbs/1.jpg", "__MACOSX/a/1.jpg")
    splits = load_dataset("folder", tmp_path)
    assert (
        splits.train.class_names + splits.test.class_names == ("a", "b") and len(splits.train) == len(splits.test) == 1
    )


def test_empty_class_folders_are_left_out_with_a_warning(tmp_path):
    tree(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "void").mkdir()
    with pytest.warns(UserWarning, match="1 folders hold no images .*void"):
        splits = load_dataset("folder", tmp_path)
    assert splits.test.class_names == ("b",)


def test_two_parts_with_the_same_classes(tmp_path):
    tree(tmp_path, *(f"{part}/{c}/{part}_{c}_{k}.jpg" for part in ("train", "test") for c in "abcd" for k in range(2)))
    splits = load_dataset("folder", tmp_path)
    assert names(splits.train) == [f"train_{c}_{k}.jpg" for c in "ab" for k in range(2)]
    assert names(splits.test) == [f"test_{c}_{k}.jpg" for c in "cd" for k in range(2)]
    assert load_dataset("folder", tmp_path, train_classes=3).test.class_names == ("d",)
    chosen = load_dataset("folder", tmp_path, train_classes=["b", "c"])
    assert chosen.train.class_names == ("b", "c") and names(chosen.test)[0] == "test_a_0.jpg"


def test_two_parts_with_different_classes(tmp_path):
    tree(tmp_path, "train/z/1.jpg", "train/b/2.jpg", "test/a/3.jpg", "test/c/4.jpg", "test/d/5.jpg")
    splits = load_dataset("folder", tmp_path)
    assert splits.train.class_names == ("b", "z") and names(splits.test) == ["3.jpg", "4.jpg", "5.jpg"]
    joined = load_dataset("folder", tmp_path, train_classes=2)
    assert joined.train.class_names == ("a", "b") and joined.test.class_names == ("c", "d", "z")
    assert names(joined.train) == ["2.jpg", "3.jpg"] and joined.train.labels.tolist() == [1, 0]


def test_two_parts_that_overlap_in_part_are_refused(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/b/1.jpg", "test/c/1.jpg")
    with pytest.raises(UserError, match="share the class 'b' but 'a' is in one"):
        load_dataset("folder", tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    tree(tmp_path, "bus/1.jpg", "train/1.jpg")
    assert load_dataset("folder", tmp_path).test.class_names == ("train",)
    tree(tmp_path, "test/1.jpg")
    assert load_dataset("folder", tmp_path).test.class_names == ("test", "train")


@pytest.mark.parametrize("files", [[], ["1.jpg"], ["a/1.txt"]])
def test_folders_without_images_are_refused(files, tmp_path):
    tree(tmp_path, *files)
    with pytest.raises(UserError, match="no class folder with images"):
        load_dataset("folder", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("folder", tmp_path / "nowhere")


def test_one_class_cannot_be_split(tmp_path):
    tree(tmp_path, "a/1.jpg")
    with pytest.raises(UserError, match="at least one class on each side"):
        load_dataset("folder", tmp_path)


def write(root, text, file="table.csv"):
    tree(root, *(f"img/{k}.jpg" for k in range(8)))
    (root / file).write_bytes(text.encode("utf-8"))
    return root / file


def test_a_table_is_halved_by_class(tmp_path):
    absolute = tmp_path / "img" / "1.jpg"
    file = write(tmp_path, f'path,label\nimg/0.jpg,b\n{absolute}, a\n"img/2.jpg","c, d"\nimg/3.jpg,b\n')
    for root in (file, tmp_path):
        splits = load_dataset("table", root)
        assert splits.train.class_names == ("a",) and splits.test.class_names == ("b", "c, d")
        assert names(splits.train) == ["1.jpg"] and names(splits.test) == ["0.jpg", "2.jpg", "3.jpg"]
        assert splits.test.labels.tolist() == [0, 1, 0] and splits.test.query is None


def test_a_table_with_everything(tmp_path):
    rows = ["train,x,0,0", "train,y,1,1", "test,z,1,false", "test,z,FALSE,1", "test,w,True,TRUE"]
    text = "\ufeffsplit, label ,query,gallery,path,remark\r\n"
    text += "".join(f"{row},img/{k}.jpg,\r\n" for k, row in enumerate(rows))
    splits = load_dataset("table", write(tmp_path, text, "my table.csv"))
    assert splits.train.class_names == ("x", "y") and splits.test.class_names == ("w", "z")
    np.testing.assert_array_equal(splits.test.query, [True, False, True])
    np.testing.assert_array_equal(splits.test.gallery, [False, True, True])


def test_a_split_column_follows_the_rule_of_folders(tmp_path):
    text = "path,label,split\n" + "".join(
        f"img/{k}.jpg,{label},{split}\n"
        for k, (label, split) in enumerate([("a", "train"), ("b", "train"), ("a", "test"), ("b", "test")])
    )
    splits = load_dataset("table", write(tmp_path, text))
    assert names(splits.train) == ["0.jpg"] and names(splits.test) == ["3.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path' but nothing"),
        ("file,label\n", "no column 'path' but file, label"),
        ("path,class\n", "no column 'label'"),
        ("path,label\n", "has no rows"),
        ("path,label\nimg/0.jpg,a\nimg/99.jpg,a\n", "row 3: the image .*99.jpg does not exist"),
        ("path,label\nimg/0.jpg,a\n,a\n", "row 3: the image .* does not exist"),
        ("path,label\nimg/0.jpg,\n", "row 2 has no label"),
        ("path,label\nimg/0.jpg\n", "row 2 has not 2 cells"),
        ("path,label\nimg/0.jpg,a,b\n", "row 2 has not 2 cells"),
        ("path,label,split\nimg/0.jpg,a,train\nimg/1.jpg,b,val\n", "row 3: split is 'val'"),
        ("path,label,split\nimg/0.jpg,a,train\nimg/1.jpg,b,train\n", "only train rows"),
        ("path,label,query\nimg/0.jpg,a,1\nimg/1.jpg,b,maybe\n", "row 3: query is 'maybe'"),
        ("path,label,gallery\nimg/0.jpg,a,1\nimg/1.jpg,b,0\n", "no test image as gallery"),
        ("path,label\nimg/0.jpg,a\nimg/1.jpg,a\n", "at least one class on each side"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(text, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("table", write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_or_foreign_table(tmp_path):
    with pytest.raises(UserError, match="cannot read the table .*table.csv"):
        load_dataset("table", tmp_path)
    (tmp_path / "table.csv").write_bytes(b"path,label\n\xff\xfe\x00,1\n")
    with pytest.raises(UserError, match="no UTF-8 CSV"):
        load_dataset("table", tmp_path)
