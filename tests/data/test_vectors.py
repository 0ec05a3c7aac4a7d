"""Embeddings from elsewhere: which vector belongs to which image, and what is refused."""

import csv

import numpy as np
import pytest

from metric_kd.data.folder import unlabelled
from metric_kd.data.vectors import read_vectors
from metric_kd.errors import UserError


def write(file, names, values=None, header="path"):
    values = np.arange(3.0 * len(names)).reshape(-1, 3) if values is None else values
    np.save(file, values)
    with file.with_suffix(".csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([[header], *([name] for name in names)])
    return file


IMAGES = ("/data/birds/x/1.png", "/data/birds/y/1.png", "/data/birds/y/2,3.png")


@pytest.mark.parametrize("prefix", ["", "birds/", "./", "/data/birds/", "elsewhere/birds/"])
def test_names_relative_to_the_folder_or_one_above_it(tmp_path, prefix):
    names = [f"{prefix}{name}" for name in ("y/2,3.png", "z/0.png", "x/1.png", "y/1.png")]
    vectors = read_vectors(write(tmp_path / "e.npy", names))
    assert vectors.rows(IMAGES, "/data/birds").tolist() == [2, 3, 0]
    assert vectors.values.shape == (4, 3)


def test_names_relative_to_a_folder_in_the_data(tmp_path):
    vectors = read_vectors(write(tmp_path / "e.npy", ["y/2,3.png", "x/1.png", "y/1.png"]))
    assert vectors.rows(IMAGES, "/data").tolist() == [1, 2, 0]
    relative = read_vectors(write(tmp_path / "r.npy", ["1.png", "2,3.png"]))
    assert relative.rows(IMAGES[1:], "/data").tolist() == [0, 1]
    with pytest.raises(UserError, match=r"no vector for /data/birds/y/1.png \(2 of 3"):
        relative.rows(IMAGES, "/data")  # x/1.png and y/1.png are not one image


def test_missing_vectors_are_counted_and_the_first_is_named(tmp_path):
    vectors = read_vectors(write(tmp_path / "e.npy", ["x/1.png", "y/1.png"]))
    with pytest.raises(UserError, match=r"e\.csv has no vector for .*2,3\.png \(1 of 3 images have none\)"):
        vectors.rows(IMAGES, "/data/birds")
    with pytest.raises(UserError, match=r"no vector for /data/birds/x/1.png \(3 of 3"):
        read_vectors(write(tmp_path / "f.npy", ["a.png"])).rows(IMAGES, "/data/birds")


def test_two_folders_that_fit_are_refused(tmp_path):
    names = [f"{top}/{name}" for top in ("a", "b") for name in ("x/1.png", "y/1.png", "y/2,3.png")]
    with pytest.raises(UserError, match="fit two folders"):
        read_vectors(write(tmp_path / "e.npy", names)).rows(IMAGES, "/data/birds")
    half = read_vectors(write(tmp_path / "e.npy", names[:4]))
    assert half.rows(IMAGES, "/data/birds").tolist() == [0, 1, 2], "only one of them has all images"


def test_what_is_no_table_of_vectors_is_refused(tmp_path):
    file = tmp_path / "e.npy"

    def refused(match, names=("a", "b"), **how):
        with pytest.raises(UserError, match=match) as caught:
            read_vectors(write(file, names, **how))
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)

    refused("names a twice", names=("a", "./a"))
    refused("holds 3 vectors and .* 2 paths", values=np.ones((3, 4)))
    refused("vector of b in .* is not finite", values=np.array([[0.0, 1], [np.nan, 0]]))
    refused("vector of a in .* is not finite", values=np.array([[0.0, np.inf], [0, 0]]))
    refused("no column `path`", header="file")
    for wrong in (np.ones(2), np.ones((2, 3), int), np.ones((2, 0)), np.ones((2, 2, 2))):
        refused("no .N, D. array", values=wrong)
    write(file, "ab").with_suffix(".csv").unlink()
    with pytest.raises(UserError, match=r"e\.csv does not exist"):
        read_vectors(file)
    file.write_text("no array")
    with pytest.raises(UserError, match="is no array"):
        read_vectors(file)
    with pytest.raises(UserError, match=r"none\.npy does not exist"):
        read_vectors(tmp_path / "none.npy")


def test_the_digest_tells_vectors_and_names_apart(tmp_path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    digests = {
        read_vectors(write(tmp_path / "e.npy", names, values=v)).digest()
        for names in ("ab", "ba")
        for v in (values, values + 1, values.astype(np.float32), values.astype(">f8"))
    }
    assert len(digests) == 6, "of another byte order they are read as float32"


def test_any_folder_of_images(tmp_path, picture):
    for name in ("b.png", "deep/er/a.jpg", ".hidden/c.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    records = unlabelled(tmp_path / "images")
    assert [p.split("images/")[1] for p in records.paths] == ["b.png", "deep/er/a.jpg"]
    assert records.labels.tolist() == [0, 0] and records.num_classes == 1
    (tmp_path / "empty").mkdir()
    for wrong, why in (("empty", "holds no images"), ("nowhere", "does not exist")):
        with pytest.raises(UserError, match=why):
            unlabelled(tmp_path / wrong)


def test_tables_of_other_programs(tmp_path):
    file = write(tmp_path / "e.npy", ["a.png", "b.png"])
    table = file.with_suffix(".csv")
    table.write_bytes("path\r\na.png\r\nb.png\r\n".encode("utf-8-sig"))  # as Excel saves it
    assert read_vectors(file).names == ("a.png", "b.png")
    for text, match in (
        (b"path\nc\xf4t\xe9.png\nb.png\n", r"e\.csv is no UTF-8 CSV file \(.*\); save it as one\."),
        (b'path\n"' + b"a" * 200_000 + b'"\nb.png\n', r"e\.csv is no UTF-8 CSV file"),
        (b"path,note\na.png,x\n ,y\n", r"e\.csv, row 3 has no path; write that of its image"),
        (b"note,path\nx,a.png\ny\n", r"e\.csv, row 3 has no path"),
    ):
        table.write_bytes(text)
        with pytest.raises(UserError, match=match) as caught:
            read_vectors(file)
        assert "\n" not in str(caught.value)
