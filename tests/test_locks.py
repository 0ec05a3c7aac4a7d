"""alone: what is held by another, what cannot be held at all, and what is left behind."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from metric_kd.engine.run_directory import RunDirectory
from metric_kd.errors import UserError
from metric_kd.locks import alone


def handles():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def held(tmp_path):
    """Another process holds the lock of ``tmp_path / "file"`` until it is killed."""
    code = (
        "import sys, pathlib\n"
        "from metric_kd.locks import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.kill()
    holder.wait()


def test_a_lock_that_another_process_holds(held, tmp_path):
    before = handles()
    with pytest.raises(UserError, match="^busy; wait.$"), alone(tmp_path / "file", "busy; wait."):
        pass
    assert handles() == before and (tmp_path / ".file.lock").exists()
    held.kill()
    held.wait()
    with alone(tmp_path / "file", "busy; wait."):  # it died with its process
        assert (tmp_path / ".file.lock").exists()
    assert list(tmp_path.iterdir()) == [] and handles() == before


def test_it_waits_where_there_is_no_refusal(held, tmp_path, capfd):
    threading.Timer(0.3, held.stdin.close).start()  # which ends it
    with alone(tmp_path / "file"):
        held.wait(10)
    assert list(tmp_path.iterdir()) == []
    assert "another process is making" in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL])
def test_a_place_without_locks_is_not_one_that_another_holds(tmp_path, monkeypatch, capfd, number):
    def lockf(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    before = handles()
    with pytest.raises(OSError, match=os.strerror(number)), alone(tmp_path / "file"):
        pass
    sentence = r"cannot lock .*file \(.*\); choose a place that has locks\."
    with pytest.raises(UserError, match=sentence), alone(tmp_path / "file", "busy; wait."):
        pass
    with pytest.raises(UserError, match="cannot lock .*run"), RunDirectory(tmp_path / "run").locked():
        pass
    assert handles() == before and "another process" not in capfd.readouterr().err


def test_the_lock_of_another_is_not_removed(tmp_path):
    lock = tmp_path / ".file.lock"
    with alone(tmp_path / "file"):
        lock.unlink()
        lock.write_text("another's")
    assert lock.read_text() == "another's"


def test_a_run_holds_its_directory_by_one_name_and_leaves_none(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        assert [p.name for p in run.path.iterdir()] == [".lock"]
    assert list(run.path.iterdir()) == []
    with run.locked():
        run.discard_unstarted()
    assert not run.path.exists()
