"""A student, as a run or exported, asks the index that its teacher has made."""

import numpy as np
import pytest
import torch
from tiny import THREADS, TINY

import metric_kd
from metric_kd.cli.main import main as console
from metric_kd.deploy.exported import Exported
from metric_kd.deploy.index_file import read_index
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.errors import UserError

BASE = ["--base", "resnet8_x0.5:stem_stride=2", "--l2normalize", "false"]


def student(image_folder, teacher, folder, *flags):
    torch.set_num_threads(int(THREADS))
    words = [*TINY, *BASE, "--data", image_folder, "--teacher_load", teacher, "--save_dir", folder / "student", *flags]
    assert console(["distill", *map(str, words)]) == 0
    return folder / "student"


@pytest.fixture(scope="module")
def index(image_folder, teacher_run, tmp_path_factory):
    file = tmp_path_factory.mktemp("index") / "teacher.index"
    assert console(["index", str(teacher_run), "--images", str(image_folder), "--out", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def bridged(image_folder, teacher_run, tmp_path_factory):
    flags = ["--embedding_size", 24, "--dist_ratio", 1, "--bridge", "ridge"]
    return student(image_folder, teacher_run, tmp_path_factory.mktemp("bridged"), *flags)


@pytest.fixture(scope="module")
def tied(image_folder, teacher_run, tmp_path_factory):
    flags = ["--embedding_size", 16, "--loss", "csd:1"]
    return student(image_folder, teacher_run, tmp_path_factory.mktemp("tied"), *flags)


def nearest(index, vectors, k):
    """(paths, distances) by comparing vectors of length 1 with every row of the index."""
    content = read_index(index)
    far = np.linalg.norm(vectors / np.linalg.norm(vectors) - content.index.vectors(), axis=1)
    rows = np.argsort(far)[:k]
    return [content.files.names[row] for row in rows], far[rows]


def check(searcher, index, vectors, query, folder):
    names, far = nearest(index, vectors, 5)
    hits = searcher.search(query, 5)[0]
    assert [hit.path for hit in hits] == [str(folder / name) for name in names]
    np.testing.assert_allclose([hit.distance for hit in hits], far, atol=1e-5)


def test_through_a_bridge(index, bridged, image_folder, tmp_path, capsys):
    query = str(image_folder / "class03" / "05.png")
    vectors = metric_kd.load(bridged, bridge=True).embed(query)
    assert vectors.shape == (1, 16) and np.linalg.norm(vectors) != 1
    check(metric_kd.Searcher(index, bridged, bridge=True), index, vectors, query, image_folder)
    page = tmp_path / "found.html"
    words = ["search", index, "--query", query, "--k", 3, "--model", bridged, "--bridge", "--page", page]
    assert console(list(map(str, words))) == 0
    assert "through a ridge bridge" in page.read_text() and "Queries by" in page.read_text()


def test_without_a_bridge_where_a_loss_ties_them(index, tied, image_folder):
    query = str(image_folder / "class05" / "01.png")
    check(metric_kd.Searcher(index, tied), index, metric_kd.load(tied).embed(query), query, image_folder)
    with pytest.raises(UserError, match="holds no bridge; train it"):
        metric_kd.Searcher(index, tied, bridge=True).search(query)


def test_exported_with_its_bridge(index, bridged, tied, image_folder, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    query = str(image_folder / "class02" / "07.png")
    out = tmp_path / "student.onnx"
    flags = ["--to", "onnx", "--bridge", "--count", "8"]
    assert console(["export", str(bridged), "--out", str(out), *flags]) == 0
    exported, loaded = Exported(out), metric_kd.load(bridged, bridge=True)
    assert (exported.dimensions, exported.normalised) == (16, False)
    np.testing.assert_allclose(exported.embed(query), loaded.embed(query), atol=1e-2)  # another kernel resizes
    check(metric_kd.Searcher(index, out), index, exported.embed(query), query, image_folder)
    assert "in the space of the teacher" in (tmp_path / "student.onnx.md").read_text()
    assert "through a ridge bridge" in (tmp_path / "student.onnx.md").read_text()
    assert console(["export", str(tied), "--out", str(out), *flags]) == 2
    assert "holds no bridge" in capsys.readouterr().err
    with pytest.raises(UserError, match="leave --bridge out"):
        metric_kd.Searcher(index, out, bridge=True).search(query)


@pytest.mark.parametrize("int8", [(), ("--int8", "dynamic")])
def test_a_network_asks_as_it_was_exported(index, teacher_run, image_folder, tmp_path, int8):
    """And the other way round: the run asks what its exported file has indexed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    query = str(image_folder / "class06" / "03.png")
    out, own = tmp_path / "teacher.onnx", tmp_path / "own.index"
    words = ["export", teacher_run, "--out", out, "--to", "onnx", *int8, "--count", "8", "--skip_recall"]
    assert console(list(map(str, words))) == 0
    check(metric_kd.Searcher(index, out), index, Exported(out).embed(query), query, image_folder)
    assert console(["index", str(out), "--images", str(image_folder), "--out", str(own)]) == 0
    check(metric_kd.Searcher(own, teacher_run), own, metric_kd.load(teacher_run).embed(query), query, image_folder)
    content = read_checkpoint(teacher_run)
    content.pop("format", None)
    next(iter(content["model"].values())).view(-1)[0] += 0.1
    write_checkpoint(tmp_path / "changed.pth", content)
    with pytest.raises(UserError, match="is neither the model"):
        metric_kd.Searcher(own, tmp_path / "changed.pth").search(query)


def test_who_would_find_things_by_chance_is_refused(index, bridged, tied, image_folder, tmp_path):
    query = str(image_folder / "class00" / "00.png")
    with pytest.raises(UserError, match="no loss of .* ties it to the space of .*; give --bridge"):
        metric_kd.Searcher(index, bridged).search(query)
    with pytest.raises(UserError, match="--bridge leads from a student .*; name the student"):
        metric_kd.Searcher(index, bridge=True)
    other = tmp_path / "other.index"
    assert console(["index", str(tied), "--images", str(image_folder), "--out", str(other)]) == 0
    with pytest.raises(UserError, match="is neither the model .* nor a student of it; give another --model"):
        metric_kd.Searcher(other, bridged, bridge=True).search(query)
