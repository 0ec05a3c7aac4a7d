"""Indexes: exact where they say so, whole or not there at all, the same after any kill, and up to date with their folder."""

import errno
import io
import itertools
import os
import random
import shutil
import signal
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from mortal import ON_DISK, attempt
from PIL import Image
from tiny import succeeds

from metric_kd.deploy import index_file, index_part, indexing, vector_index
from metric_kd.deploy.factory import Factory, check_factory, choose_factory, parse_factory
from metric_kd.deploy.index_file import NoIndex, read_index
from metric_kd.deploy.indexing import make_index
from metric_kd.deploy.lineage import Lineage
from metric_kd.deploy.measuring import measure
from metric_kd.deploy.model import Model
from metric_kd.deploy.searcher import Searcher
from metric_kd.deploy.vector_index import Approximate, Flat, build
from metric_kd.errors import UserError

FACTORIES = ["Flat", "IVF4,Flat", "IVF2,PQ4", "HNSW8"]


class Toy:
    """An image's embedding: eight of its pixels' values. It counts what it embeds."""

    def __init__(self, pause=0.0):
        self.seen, self.pause = [], pause

    def embed(self, images, batch=64, progress=False, skipped=None):
        rows = []
        for path in images:
            try:
                pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
            except OSError:
                if skipped is None:
                    raise UserError(f"cannot read the image {path}.") from None
                skipped.append(path)
                continue
            rows.append(pixels.reshape(-1)[:8] / 255)
            self.seen.append(os.path.basename(path))
            time.sleep(self.pause)
        return np.array(rows, np.float32).reshape(-1, 8)


def toy(digest="d", pause=0.0):
    return Model(Toy(pause), "/nowhere/run", digest, 8, "toy", False, "", "w", Lineage())


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    for k in range(12):
        draw(tmp_path / "images" / "ab"[k % 2] / f"{k:02d}.png", k)
    return tmp_path / "images"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_part, "BLOCK", 4)


@pytest.fixture
def few_for_pq():
    """300 vectors, as PQ needs 256, without 300 files."""
    return np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)


def slow_oracle(vectors, query, k):
    far = np.array([np.sqrt(((v.astype(np.float64) - query) ** 2).sum()) for v in vectors])
    order = np.argsort(far, kind="stable")[:k]
    return order, far[order]


def expected(folder):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    return {name: Toy().embed([folder / name])[0] for name in names}


def holds(file, folder):
    """That the index holds the folder as it is: every image once, found at distance 0 by its own vector, no other."""
    content = read_index(file)
    right = expected(folder)
    assert sorted(content.files.names) == sorted(right)
    vectors = content.index.vectors()
    for row, name in enumerate(content.files.names):
        np.testing.assert_array_equal(vectors[row], right[name])
        rows, far = content.index.search(right[name][None], 1, 4)
        assert rows[0, 0] == row and far[0, 0] == 0
    return content


# What a search finds


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_flat_is_exact_and_settles_ties_by_row(queries):
    draw_of = np.random.default_rng(0)
    vectors = draw_of.integers(-2, 3, (400, 3)).astype(np.float32)  # many ties and duplicates
    asked = draw_of.integers(-2, 3, (queries, 3)).astype(np.float32)
    rows, far = Flat(vectors).search(asked, 6)
    for query, near, distance in zip(asked, rows, far, strict=True):
        order, true = slow_oracle(vectors, query, 6)
        np.testing.assert_allclose(distance, true, rtol=1e-6)
        assert near.tolist() == order.tolist() or queries >= vector_index.DIRECT  # there, beyond the spare candidates


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_flat_is_exact_far_from_the_origin_too(offset):
    draw_of = np.random.default_rng(0)
    vectors = (draw_of.standard_normal((5000, 16)) + offset).astype(np.float32)
    for query in (draw_of.standard_normal((4, 16)) + offset).astype(np.float32):
        rows, far = Flat(vectors).search(query[None], 10)
        order, true = slow_oracle(vectors, query, 10)
        assert rows[0].tolist() == order.tolist()
        np.testing.assert_allclose(far[0], true, rtol=1e-5)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "IVF2,PQ4"])
def test_with_all_effort_the_approximate_ones_find_the_true_nearest(factory, few_for_pq):
    vectors = few_for_pq
    index = build(parse_factory(factory), vectors, keep="float32" if "PQ" in factory else None)
    asked = np.random.default_rng(2).standard_normal((10, 8)).astype(np.float32)
    rows, far = index.search(asked, 5, 300)
    for query, near, distance in zip(asked, rows, far, strict=True):
        order, true = slow_oracle(vectors, query, 5)
        if "PQ" in factory:  # codes choose the candidates
            assert len(set(near) & set(order)) >= 2
            np.testing.assert_allclose(distance, np.linalg.norm(vectors[near] - query, axis=1), rtol=1e-5)
        else:
            assert near.tolist() == order.tolist()
            np.testing.assert_allclose(distance, true, rtol=1e-4)
    again = build(parse_factory(factory), vectors, keep="float32" if "PQ" in factory else None)
    assert all(np.array_equal(a, b) for a, b in zip(again.search(asked, 5), index.search(asked, 5), strict=True))
    assert measure(index, 300).recall1 >= 0.95


def test_fewer_are_found_where_the_lists_hold_fewer(few_for_pq):
    index = build(Factory("IVF", lists=100), few_for_pq)
    rows, far = index.search(few_for_pq[:1], 50, 1)
    assert rows[0, 0] == 0 and rows[0, -1] == -1 and np.isinf(far[0, -1])


@pytest.mark.parametrize("factory", FACTORIES)
def test_updating_keeps_order_and_vectors(factory, few_for_pq):
    vectors, new = few_for_pq, np.random.default_rng(3).standard_normal((20, 8)).astype(np.float32)
    keep = np.random.default_rng(4).random(300) < 0.7
    index = build(parse_factory(factory), vectors)
    for _ in range(2):  # twice: ids have gaps by then
        index = index.updated(keep, new)
        vectors = np.concatenate([vectors[keep], new])
        assert len(index) == len(vectors)
        if "PQ" not in factory:
            np.testing.assert_array_equal(index.vectors(), vectors)
        rows, _ = index.search(vectors, 3, 300)
        assert np.mean([row in near for row, near in enumerate(rows)]) > (0.5 if "PQ" in factory else 0.999)
        keep = np.ones(len(vectors), bool)
        keep[[0, 5, -1]] = False


def test_recall_is_measured_against_the_truth(few_for_pq):
    """A search that finds the second nearest first, and loses the tenth."""

    class Lossy(Flat):
        factory = Factory("HNSW", links=8)

        def search(self, queries, k, effort=None):
            rows, far = super().search(queries, min(k + 1, len(self)), effort)
            rows[:, [1, 2]] = rows[:, [2, 1]]
            rows[:, 10:] = rows[:, 11:12] if rows.shape[1] > 11 else rows[:, :1]
            return rows[:, :k], far[:, :k]

    class Harmless(Lossy):
        def search(self, queries, k, effort=None):
            return Flat.search(self, queries, k, effort)

    lossy = measure_as_approximate(Lossy(few_for_pq))
    assert lossy == pytest.approx((0.0, 0.9))
    assert measure_as_approximate(Harmless(few_for_pq)) == (1.0, 1.0)


def measure_as_approximate(index):
    from metric_kd.deploy.measuring import _recalls

    chosen = np.arange(0, 300, 7)
    return _recalls(index, None, index.vectors(), chosen, index.vectors()[chosen])


def test_few_vectors_and_duplicates_are_measured():
    assert measure(build(Factory("HNSW", links=8), np.ones((5, 4), np.float32))).recall10 == 1.0
    assert measure(Flat(np.ones((1, 4), np.float32))).recall1 is None


# Factories


def test_factories_are_read_and_chosen():
    for text in FACTORIES:
        assert str(parse_factory(text)) == text
    assert str(choose_factory(99_999, 128)) == "Flat"
    assert str(choose_factory(250_000, 128)) == "IVF2000,Flat"
    assert str(choose_factory(4_000_000, 128)) == "IVF8000,PQ32"
    assert choose_factory(2_000_000, 30).pieces == 6 and choose_factory(2_000_000, 3).pieces == 1
    for text, words in [("HNSW", "HNSW32"), ("flat", "Flat"), ("LSH", "choose one of"), ("IVF0,Flat", "impossible")]:
        with pytest.raises(UserError, match=words):
            parse_factory(text)
    with pytest.raises(UserError, match="1,024 images or more, and there are 1,023"):
        check_factory(parse_factory("IVF1024,Flat"), 1023, 8)
    with pytest.raises(UserError, match="choose PQ4"):
        check_factory(parse_factory("IVF1,PQ3"), 1000, 8)


# Making, killing, growing


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


def half_of_write_array(write_array, file, *arguments, **named):
    half = io.BytesIO()
    write_array(half, *arguments, **named)
    file.write(half.getvalue()[: half.tell() // 2])
    file._fileobj.flush()


CALLS = {**ON_DISK, (np.lib.format, "write_array"): half_of_write_array}


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_killed_at_any_moment_it_goes_on_to_the_same_file(folder, tmp_path, small_blocks, factory):
    file, whole = tmp_path / "i", tmp_path / "whole"
    make_index(toy(), folder, whole, factory=factory, batch=2)
    first = whole.read_bytes()
    draw(folder / "c" / "new.png", 77)
    (folder / "a" / "00.png").unlink()
    make_index(toy(), folder, whole, factory=factory, batch=2)
    second = whole.read_bytes()
    make_index(toy(), folder, tmp_path / "fresh", factory=factory, batch=2)
    fresh = (tmp_path / "fresh").read_bytes()
    for before, after in ((None, fresh), (first, second)):
        for moment in itertools.count(1):
            file.unlink(missing_ok=True)
            if before is not None:
                file.write_bytes(before)
            status = attempt(
                lambda: make_index(toy(), folder, file, factory=factory, batch=2), kill_at=moment, calls=CALLS
            )
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "it died of something else"
            assert (file.read_bytes() if file.exists() else None) in (before, after), "neither the old nor the new file"
            for left in tmp_path.iterdir():  # whatever name it may get
                if left.is_file() and left.name not in ("i", "whole", "fresh"):
                    assert refused_or(left, after)
            make_index(toy(), folder, file, factory=factory, batch=2)
            assert file.read_bytes() == after
            assert {p.name for p in tmp_path.iterdir()} == {"images", "i", "whole", "fresh"}
        assert moment > 12, "the writes are not counted any more"


def refused_or(file, whole):
    try:
        read_index(file)
    except UserError:
        return True
    return file.read_bytes() == whole


def test_killed_by_others_at_random_moments(folder, tmp_path, small_blocks):
    make_index(toy(), folder, tmp_path / "whole", batch=2)
    file, moments = tmp_path / "i", random.Random(0)
    kills = 0
    while not file.exists() and kills < 100:
        child = os.fork()
        if child == 0:
            try:
                make_index(toy(pause=0.01), folder, file, batch=2)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    make_index(toy(), folder, file, batch=2)
    assert kills >= 2 and file.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_was_embedded_is_not_embedded_again(folder, tmp_path, small_blocks):
    file, model = tmp_path / "i", toy()
    assert attempt(lambda: make_index(toy(), folder, file, batch=2), kill_at=10, calls=CALLS)
    done = index_part._head(tmp_path / "i.part")[0]
    assert 4 <= done < 12
    draw(folder / "c" / "new.png", 77)  # also where the folder has changed meanwhile
    (folder / "a" / "00.png").unlink()
    make_index(model, folder, file, batch=2)
    assert len(model.embedder.seen) == 12 - done + 1
    holds(file, folder)


def test_unfinished_work_of_others_is_refused_and_half_a_part_forgotten(folder, tmp_path, small_blocks):
    file = tmp_path / "i"
    assert attempt(lambda: make_index(toy(), folder, file, batch=2), kill_at=14, calls=CALLS)
    with pytest.raises(UserError, match="unfinished work with another model"):
        make_index(toy("other"), folder, file)
    with pytest.raises(UserError, match="unfinished work with another model or precision"):
        make_index(toy(), folder, file, precision="bf16")
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="unfinished work with another folder"):
        make_index(toy(), tmp_path / "copy", file)
    with open(tmp_path / "i.part", "rb+") as part:
        part.truncate(5000)
    make_index(toy(), folder, file)
    holds(file, folder)


def test_a_model_that_fails_at_once_leaves_no_unfinished_work_behind(folder, tmp_path):
    class Broken(Toy):
        def embed(self, images, batch=64, progress=False, skipped=None):
            return np.full((len(images), 8), np.nan, np.float32)

    file = tmp_path / "i"
    with pytest.raises(UserError, match="not finite"):
        make_index(toy("broken")._replace(embedder=Broken()), folder, file)
    assert os.listdir(tmp_path) == ["images"]
    assert attempt(lambda: make_index(toy("broken"), folder, file, batch=2), kill_at=4, calls=CALLS)
    assert index_part._head(tmp_path / "i.part")[0] == 0, "nothing was embedded yet by the one that was killed"
    make_index(toy(), folder, file)
    holds(file, folder)


def test_what_an_error_or_a_kill_left_half_written_is_removed_and_no_more(folder, tmp_path, small_blocks, monkeypatch):
    file = tmp_path / "i[0]"  # a name that means something in a pattern

    def full(into, content):
        into.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index_file, "_write", full)
        with pytest.raises(OSError, match="No space left"):
            make_index(toy(), folder, file, batch=2)
    assert sorted(os.listdir(tmp_path)) == ["i[0].part", "images"], "the embeddings are kept, and nothing else"
    others = {".i[0].more.abcd1234.part", ".i0.abcd1234.part", "i[0].more.part", ".part"}
    for name in (*others, ".i[0].abcd1234.part", ".i[0].part.abcd1234.part"):
        (tmp_path / name).write_bytes(b"half")
    model = toy()
    make_index(model, folder, file, batch=2)
    assert not model.embedder.seen and set(os.listdir(tmp_path)) == {"i[0]", "images", *others}


def test_two_at_once(folder, tmp_path):
    seen = threading.Event()

    class Slow(Toy):
        def embed(self, *arguments, **named):
            seen.set()
            time.sleep(0.3)
            return super().embed(*arguments, **named)

    child = os.fork()
    if child == 0:
        try:
            make_index(toy()._replace(embedder=Slow()), folder, tmp_path / "i")
        finally:
            os._exit(0)
    while not (tmp_path / "i.part").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is writing"):
        make_index(toy(), folder, tmp_path / "i")
    os.waitpid(child, 0)
    holds(tmp_path / "i", folder)


# Files that are refused


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


# Searcher


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


def test_kept_vectors_order_what_codes_find(few_for_pq, tmp_path):
    plain, kept = (build(parse_factory("IVF2,PQ4"), few_for_pq, keep) for keep in (None, "float16"))
    assert isinstance(kept, Approximate) and kept.kept.dtype == np.float16 and plain.vectors() is None
    assert measure(plain).recall1 is None
    assert measure(kept).recall1 > measure(plain, vectors=few_for_pq).recall1


def test_beside_libraries_that_teach_faiss_tensors():
    """They replace methods of its indexes in the whole process; so in a process of its own."""
    code = (
        "import numpy as np\n"
        "import faiss.contrib.torch_utils\n"
        "from metric_kd.deploy.factory import parse_factory\n"
        "from metric_kd.deploy.vector_index import build\n"
        "vectors = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)\n"
        "for factory in ('Flat', 'IVF4,Flat', 'HNSW8'):\n"
        "    rows, _ = build(parse_factory(factory), vectors).search(vectors[:5], 1, 300)\n"
        "    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4], rows\n"
    )
    succeeds(code)
