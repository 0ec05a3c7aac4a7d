"""Indexes: up to date with their folder, refused where they are damaged or of something else, and searched."""

import os
import random
import shutil
import threading
import zipfile

import numpy as np
import pytest
import torch
from toys import draw, expected, holds, toy

from metric_kd.deploy import indexing, vector_index
from metric_kd.deploy.factory import Factory
from metric_kd.deploy.index_file import NoIndex, read_index
from metric_kd.deploy.indexing import make_index
from metric_kd.deploy.searcher import Searcher
from metric_kd.errors import UserError


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "auto"])
def test_an_index_holds_its_folder(folder, tmp_path, factory):
    made = make_index(toy(), folder, tmp_path / "i", factory=factory)
    assert (made.added, made.changed, made.removed) == (12, 0, 0)
    holds(tmp_path / "i", folder)
    assert sorted(os.listdir(tmp_path)) == ["i", "images"], "nothing else is left"
    again = make_index(toy(), folder, tmp_path / "i", factory=factory)
    assert again.unchanged


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_a_changed_folder_changes_what_it_must_and_no_more(folder, tmp_path, factory):
    file, model = tmp_path / "i", toy()
    make_index(model, folder, file, factory=factory)
    model.embedder.seen.clear()
    draw(folder / "c" / "new.png", 77)
    (folder / "a" / "00.png").unlink()
    draw(folder / "b" / "01.png", 78)
    os.utime(folder / "b" / "01.png", ns=(1, 1))  # a changed file is noticed by its time alone
    made = make_index(model, folder, file, factory=factory)
    assert (made.added, made.changed, made.removed) == (1, 1, 1)
    assert sorted(model.embedder.seen) == ["01.png", "new.png"]
    holds(file, folder)
    for name in ("02", "04", "06"):
        (folder / "a" / f"{name}.png").unlink()
    made = make_index(model, folder, file, factory=factory)
    assert (made.added, made.changed, made.removed) == (0, 0, 3)
    holds(file, folder)


def test_an_index_may_shrink_below_what_its_lists_were_trained_on(folder, tmp_path):
    file = tmp_path / "i"
    make_index(toy(), folder, file, factory="IVF10,Flat")
    for name in ("00", "02", "04"):
        (folder / "a" / f"{name}.png").unlink()
    made = make_index(toy(), folder, file, factory="IVF10,Flat")
    assert (made.added, made.changed, made.removed) == (0, 0, 3)
    assert holds(file, folder).index.trained == 12
    for path in folder.rglob("*.png"):  # nothing is left of what they were trained on
        os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="10 images or more, and there are 9"):
        make_index(toy(), folder, file, factory="IVF10,Flat")


def test_auto_trains_again_when_it_is_outgrown(folder, tmp_path, monkeypatch):
    def chosen(count, dimensions):
        return Factory("Flat") if count < 13 else Factory("IVF", lists=2 if count < 20 else 3)

    monkeypatch.setattr(indexing, "choose_factory", chosen)
    kinds, notes = [], []
    for step in range(4):  # 12, 19, 26 and 33 images
        for k in range(7 if step else 0):
            draw(folder / "more" / f"{step}{k}.png", 100 * step + k)
        made = make_index(toy(), folder, tmp_path / "i")
        kinds.append(str(holds(tmp_path / "i", folder).index.factory))
        notes.append(len(made.notes))
    assert kinds == ["Flat", "IVF2,Flat", "IVF2,Flat", "IVF2,Flat"] and notes == [0, 1, 0, 0]
    for k in range(30):
        draw(folder / "many" / f"{k}.png", 1000 + k)
    assert "has become IVF3,Flat" in make_index(toy(), folder, tmp_path / "i").notes[0]
    holds(tmp_path / "i", folder)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_no_damaged_byte_is_taken(folder, tmp_path, factory):
    file = tmp_path / "i"
    make_index(toy(), folder, file, factory=factory)
    whole = file.read_bytes()
    truth = contents(file)
    refused = 0
    positions = range(random.Random(factory).randrange(7), len(whole), 7)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            found = contents(file)
        except NoIndex as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert found == truth, f"byte {position} of {len(whole)}"
    assert refused > len(positions) / 2
    for length in range(0, len(whole), 397):
        file.write_bytes(whole[:length])
        with pytest.raises(NoIndex):
            read_index(file)


def contents(file):
    content = read_index(file)
    asked = np.full((1, 8), 0.5, np.float32)
    rows, far = content.index.search(asked, 5)
    files = content.files
    return (content.about, files.names, files.sizes.tolist(), files.modified.tolist(), rows.tolist(), far.tolist())


def test_what_is_no_index_is_refused_before_anything_is_embedded(folder, tmp_path):
    file, model = tmp_path / "i", toy()
    cases = [b"", b"my diary", b"PK\x05\x06" + bytes(18)]
    for content in cases:
        file.write_bytes(content)
        with pytest.raises(NoIndex, match="is no index, or was damaged"):
            make_index(model, folder, file)
        assert file.read_bytes() == content
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("manifest.json", '{"format": "metric_kd index 99"}')
    with pytest.raises(NoIndex, match="has format 'metric_kd index 99'"):
        make_index(model, folder, file)
    file.unlink()
    with pytest.raises(UserError, match="does not exist; make it"):
        read_index(file)
    assert not model.embedder.seen


def test_what_cannot_be_is_refused_before_anything_is_embedded(folder, tmp_path, monkeypatch):
    model = toy()

    def refused(words, file=tmp_path / "i", model=model, images=folder, **flags):
        with pytest.raises(UserError, match=words) as caught:
            make_index(model, images, file, **flags)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")

    refused("is a folder", file=tmp_path)
    refused("does not exist; create", file=tmp_path / "no" / "i")
    refused("holds no images", images=tmp_path_of(tmp_path, "empty"))
    refused("is no folder", images=tmp_path / "nowhere")
    refused("choose one of", factory="XYZ")
    refused("13 images or more, and there are 12", factory="IVF13,Flat")
    refused("256 images or more", factory="IVF2,PQ4")
    refused("choose PQ4", factory="IVF2,PQ3")
    refused("leave --keep_vectors out", factory="Flat", keep_vectors="float16")
    monkeypatch.setattr(indexing.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    refused("make room")
    monkeypatch.undo()
    open(folder / "a" / "broken.png", "wb").close()
    refused("broken.png")
    assert not model.embedder.seen and not (tmp_path / "i").exists()
    make_index(model, folder, tmp_path / "i", skip_unreadable=True)
    (folder / "a" / "broken.png").unlink()
    refused("made with another model", model=toy("other"))
    refused("made with --factory auto", factory="Flat")
    refused("made with another folder", images=shutil.copytree(folder, tmp_path / "copy"))
    refused("made with --precision fp32", precision="bf16")


def tmp_path_of(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_without_faiss_flat_works_and_the_others_say_so(folder, tmp_path, monkeypatch):
    make_index(toy(), folder, tmp_path / "ivf", factory="IVF4,Flat")

    def none():
        raise UserError("no faiss.")

    monkeypatch.setattr(vector_index, "load_faiss", none)
    make_index(toy(), folder, tmp_path / "flat", factory="Flat")
    assert len(Searcher(tmp_path / "flat").search(np.zeros(8, np.float32), 3)[0]) == 3
    for call in (
        lambda: make_index(toy(), folder, tmp_path / "i", factory="IVF4,Flat"),
        lambda: Searcher(tmp_path / "ivf"),
    ):
        with pytest.raises(UserError, match="pip install faiss-cpu, or use --factory Flat"):
            call()
    monkeypatch.setattr(indexing, "choose_factory", lambda count, dimensions: Factory("IVF", lists=2))
    assert "Flat instead" in make_index(toy(), folder, tmp_path / "auto").notes[0]


def test_unreadable_files_are_skipped_and_taken_when_mended(folder, tmp_path):
    file = tmp_path / "i"
    (folder / "a" / "02.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    made = make_index(toy(), folder, file, skip_unreadable=True)
    assert made.skipped == (os.path.join("a", "02.png"),) and made.added == 11
    draw(folder / "a" / "02.png", 2)
    assert make_index(toy(), folder, file).added == 1
    holds(file, folder)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    with pytest.raises(UserError, match="none of the images"):
        make_index(toy(), folder, tmp_path / "j", skip_unreadable=True)


def test_a_searcher_answers(folder, tmp_path):
    make_index(toy(), folder, tmp_path / "i")
    searcher = Searcher(tmp_path / "i")
    name = os.path.join("a", "04.png")
    right = expected(folder)
    assert len(searcher) == 12 and searcher.factory == "Flat" and searcher.dimensions == 8
    for query in (right[name], torch.from_numpy(right[name])[None], right[name].astype(np.float64)):
        (hits,) = searcher.search(query, 3)
        assert hits[0].path == str(folder / name) and hits[0].distance == 0
        assert [hit.distance for hit in hits] == sorted(hit.distance for hit in hits)
    assert [len(hits) for hits in searcher.search(np.stack(list(right.values())), 2)] == [2] * 12
    assert searcher.search(np.empty((0, 8), np.float32), 2) == []
    shutil.move(folder, tmp_path / "moved")
    assert Searcher(tmp_path / "i", images=tmp_path / "moved").search(right[name], 1)[0][0].path == str(
        tmp_path / "moved" / name
    )
    for queries, k, nprobe, words in (
        (right[name], 13, None, "holds 12 images"),
        (right[name], 0, None, "give 1 or more"),
        (right[name][:5], 3, None, "length 8"),
        (np.full(8, np.nan, np.float32), 3, None, "not finite"),
        (right[name], 3, 4, "leave --nprobe out"),
        ("query.png", 3, None, "/nowhere/run of .* is not there; give the one .* as --model"),
    ):
        with pytest.raises(UserError, match=words):
            searcher.search(queries, k, nprobe)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_threads_may_share_a_searcher(folder, tmp_path, factory):
    make_index(toy(), folder, tmp_path / "i", factory=factory)
    searcher = Searcher(tmp_path / "i")
    effort = None if factory == "Flat" else 4
    asked = np.random.default_rng(0).random((40, 8)).astype(np.float32)
    alone = [searcher.search(query, 4, effort) for query in asked]
    wrong = []

    def work():
        wrong.extend(k for k, query in enumerate(asked) if searcher.search(query, 4, effort) != alone[k])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
