"""Indexes after kills, errors and others at work: whole or not there at all, and the same in the end."""

import errno
import io
import itertools
import os
import random
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from mortal import ON_DISK, attempt, fork
from toys import Toy, draw, holds, toy

from metric_kd.deploy import index_file, index_part
from metric_kd.deploy.index_file import read_index
from metric_kd.deploy.indexing import make_index
from metric_kd.errors import UserError


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
        child = fork()
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
    mark = "abcd1234.metric_kd.part"
    others = {f".i[0].more.{mark}", f".i0.{mark}", "i[0].more.part", ".part", ".i[0].abcd1234.part"}
    for name in (*others, f".i[0].{mark}", f".i[0].part.{mark}"):
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

    child = fork()
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
