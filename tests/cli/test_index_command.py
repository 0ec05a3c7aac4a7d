"""`metric-kd index` and `metric-kd search` end to end on a tiny run."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import template
from template import Forked
from tiny import ROOT

import metric_kd
from metric_kd.cli.main import main as console
from metric_kd.deploy.index_file import read_index


@pytest.fixture(scope="module")
def index(teacher_run, image_folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("index") / "photos.index"
    assert console(["index", str(teacher_run), "--images", str(image_folder), "--out", str(file)]) == 0
    return file


def refusal(capsys, *words):
    capsys.readouterr()
    assert console(list(map(str, words))) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_the_index_holds_the_embeddings_and_says_so(index, teacher_run, image_folder, capsys):
    content = read_index(index)
    vectors = metric_kd.load(teacher_run).embed([str(image_folder / name) for name in content.files.names])
    np.testing.assert_allclose(content.index.vectors(), vectors, atol=1e-5)
    assert console(["index", str(teacher_run), "--images", str(image_folder), "--out", str(index)]) == 0
    assert f"{index} is up to date: 64 images, Flat" in capsys.readouterr().out
    other = index.with_name("other")
    flags = ["--factory", "HNSW8", "--batch", "16"]
    assert console(["index", str(teacher_run), "--images", str(image_folder), "--out", str(other), *flags]) == 0
    printed = capsys.readouterr().out
    assert "64 added, 0 changed, 0 removed" in printed and "of the true nearest 10 (64 of its own" in printed
    assert "ms per query" in printed and "MB per million vectors" in printed


def test_search_prints_ranks_distances_and_paths(index, teacher_run, image_folder, tmp_path, capsys):
    query = image_folder / "class03" / "05.png"
    capsys.readouterr()
    page = tmp_path / "page.html"
    assert console(["search", str(index), "--query", str(query), "--k", "4", "--page", str(page), "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranks, distances, paths = zip(*(line.split() for line in lines[:4]), strict=True)
    assert ranks == ("1", "2", "3", "4") and distances[0] == "0.0000" and paths[0] == str(query)
    vectors = metric_kd.load(teacher_run).embed([query, *paths])
    np.testing.assert_allclose(np.array(distances, float), np.linalg.norm(vectors[1:] - vectors[0], axis=1), atol=2e-4)
    assert lines[4] == f"wrote {page}" and lines[5].startswith("Flat: finds 100.0% of the true nearest")
    assert page.read_text().count("<img") == 5
    assert console(["search", str(index), "--query", str(query), str(query), "--k", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["query"] for entry in found] == [str(query)] * 2
    assert found[0]["found"][0] == {"rank": 1, "distance": pytest.approx(0, abs=1e-6), "path": str(query)}
    (hits,) = metric_kd.Searcher(index).search(query, k=2)
    assert [hit.path for hit in hits] == [hit["path"] for hit in found[0]["found"]]


def test_a_moved_model_needs_to_be_named_and_another_is_refused(index, teacher_run, image_folder, tmp_path, capsys):
    run, images = tmp_path / "run", str(image_folder)
    shutil.copytree(teacher_run, run)
    file, query = tmp_path / "i", str(image_folder / "class00" / "00.png")
    assert console(["index", str(run), "--images", images, "--out", str(file)]) == 0
    shutil.move(run, tmp_path / "moved")
    assert "is not there; give the one it was made with as --model" in refusal(capsys, "search", file, "--query", query)
    flags = ["--query", query, "--k", "1", "--model", str(tmp_path / "moved")]
    assert console(["search", str(file), *flags]) == 0
    other = make_other(tmp_path / "moved", tmp_path / "other.pth")
    text = refusal(capsys, "search", file, "--query", query, "--model", other)
    assert "is neither the model that" in text and "or make the index again" in text
    assert "made with another model" in refusal(capsys, "index", other, "--images", images, "--out", file)


def make_other(run, file):
    """The same network with one number changed."""
    from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint

    content = read_checkpoint(run)
    content.pop("format", None)
    next(iter(content["model"].values())).view(-1)[0] += 0.1
    write_checkpoint(file, content)
    return file


def test_an_exported_network_makes_and_searches_an_index(index, teacher_run, image_folder, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from metric_kd.deploy.export import EmbeddingGraph, describe, write_onnx

    network = metric_kd.load(teacher_run).network
    file, exported = tmp_path / "i", tmp_path / "teacher.onnx"
    graph = EmbeddingGraph(network)
    write_onnx(graph, exported, describe(graph, "teacher", "0"))
    assert console(["index", str(exported), "--images", str(image_folder), "--out", str(file)]) == 0
    np.testing.assert_allclose(read_index(file).index.vectors(), read_index(index).index.vectors(), atol=1e-4)
    query = str(image_folder / "class03" / "05.png")
    first, second = (metric_kd.Searcher(each).search(query, 5)[0] for each in (index, file))
    assert [hit.path for hit in first] == [hit.path for hit in second]
    text = refusal(capsys, "index", exported, "--images", image_folder, "--out", file, "--precision", "bf16")
    assert "an exported file has its own" in text


def test_bad_input_is_one_sentence(index, teacher_run, image_folder, tmp_path, capsys):
    query = image_folder / "class00" / "00.png"
    (tmp_path / "diary.txt").write_text("my diary")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run.pt2").touch()
    make = ["index", teacher_run, "--images", image_folder, "--out", tmp_path / "i"]
    for words, text in [
        ([*make, "--factory", "HSNW32"], "did you mean 'HNSW32'?"),
        ([*make, "--factory", "IVF65,Flat"], "trained on 65 images or more, and there are 64"),
        ([*make, "--batch", "0"], "--batch is 0"),
        ([*make[:-1], tmp_path / "no" / "i"], "does not exist; create it first"),
        ([*make[:-1], tmp_path / "i.jpg"], "ends as an image does"),
        ([*make[:-1], tmp_path / "diary.txt"], "is no index, or was damaged"),
        (["index", teacher_run, "--images", tmp_path / "empty", "--out", tmp_path / "i"], "holds no images"),
        (["index", tmp_path / "no.onnx", *make[2:]], "does not exist"),
        (
            ["index", tmp_path / "run.pt2", *make[2:]],
            "run.pt2 is a program, which an index does not open; give the run",
        ),
        (["search", index, "--query", query, "--model", tmp_path / "run.pt2"], "or export it --to onnx."),
        (["search", index, "--query", query, "--k", "65"], "k is 65, but the index holds 64 images"),
        (["search", index, "--query", tmp_path / "diary.txt"], "cannot read the query"),
        (["search", index, "--query", tmp_path / "none.png"], "cannot read the query"),
        (["search", tmp_path, "--query", query], "is a folder; give the file that metric-kd index wrote"),
        (["search", index, "--query", query, "--images", tmp_path / "no"], "is no folder; give the one where"),
        (["search", index, "--query", query, "--json", "--measure"], "give one of them"),
        (["search", index], "nothing to search for"),
        (["search", index, "--query", query, "--nprobe", "3"], "leave --nprobe out"),
        (["search", index, "--query", query, "--page", tmp_path], "ends in .html"),
        (["search", tmp_path / "diary.txt", "--query", query], "is no index, or was damaged"),
        (["search", tmp_path / "nothing", "--query", query], "does not exist; make it"),
    ]:
        assert text in refusal(capsys, *words), words
    assert sorted(os.listdir(tmp_path)) == ["diary.txt", "empty", "run.pt2"], "nothing is left behind"


def test_names_that_are_no_text_can_be_printed(teacher_run, image_folder, tmp_path, capsys):
    """Standard output refuses what is no UTF-8, as a terminal's does."""
    odd = os.fsdecode(b"\xff")
    (tmp_path / odd).mkdir()
    shutil.copy(image_folder / "class00" / "00.png", tmp_path / odd / "a\nb.png")
    (tmp_path / odd / f"{odd}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file, page = tmp_path / f"{odd}.index", tmp_path / f"{odd}.html"
    flags = ["--images", str(tmp_path / odd), "--out", str(file), "--skip_unreadable"]
    assert console(["index", str(teacher_run), *flags]) == 0
    printed = capsys.readouterr().out
    assert "skipped 1 unreadable images, the first \ufffd.png" in printed and "\ufffd.index: 1 images" in printed
    assert "it holds one image, which has no neighbour to find" in printed
    query = str(tmp_path / odd / "a\nb.png")
    assert console(["search", str(file), "--query", query, "--k", "1", "--page", str(page)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("\ufffd/a\ufffdb.png") and last == f"wrote {tmp_path}/\ufffd.html"
    assert page.is_file()


@pytest.mark.parametrize("name", ["photo (1).jpg", "a (b); repair (c).jpg"])
def test_a_query_that_cannot_be_read_is_named_with_the_reason(index, tmp_path, capsys, name):
    text = refusal(capsys, "search", index, "--query", tmp_path / name)
    assert (
        text
        == f"error: cannot read the query {tmp_path / name} (No such file or directory); give a whole image file.\n"
    )
    (tmp_path / name).touch()
    assert f"{name} (the file is empty); give" in refusal(capsys, "search", index, "--query", tmp_path / name)


def test_killed_as_a_process_and_started_again_it_writes_the_same_file(teacher_run, image_folder, tmp_path):
    code = (
        "import sys, time\n"
        "from metric_kd.cli.main import main\n"
        "from metric_kd.deploy import embedder, index_part\n"
        "index_part.BLOCK = 8\n"
        "view = embedder.Embedder._view\n"
        "def slow(self, image):\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    return view(self, image)\n"
        "embedder.Embedder._view = slow\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )

    def start(file, pause):
        words = ["index", str(teacher_run), "--images", str(image_folder), "--out", str(file), "--batch", "8"]
        return Forked(template.code, code, str(pause), *words, cwd=ROOT)

    assert start(tmp_path / "whole", 0).wait() == 0
    file, part = tmp_path / "killed", tmp_path / "killed.part"
    process = start(file, 0.05)
    while not part.exists() or np.fromfile(part, "<i8", 1, offset=16)[0] < 16:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not file.exists() and 16 <= np.fromfile(part, "<i8", 1, offset=16)[0] < 64
    assert start(file, 0).wait() == 0
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]
