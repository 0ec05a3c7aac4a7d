"""Processes that start in a moment: each is forked from a template that has already imported torch and metric_kd.

A process so made is one of its own, with its own pid, files, environment and signals; only the imports are shared.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

THREADS = os.environ.get("METRIC_KD_TEST_THREADS", "1")
"""Of PyTorch, in tests and in the processes that they start; tests/machines.py runs them on more."""
IMPORTED = ["torch._dynamo", "metric_kd.cli.main", "metric_kd.cli.distill", "pytorch_metric_learning.losses"]


def ready() -> ForkServerContext:
    """The context that forks from the template, which is started when it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = THREADS
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ.update(before)
    return context


def script(path: str, *arguments: str) -> None:
    """What ``python path arguments`` does."""
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def code(text: str, *arguments: str) -> None:
    """What ``python -c text arguments`` does."""
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def _begin(out: str, err: str, cwd: str, env: dict[str, str], work: Callable, arguments: tuple) -> None:
    """In the child: its files, folder and environment, then its work."""
    for number, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    work(*arguments)


class Forked:
    """A process forked from the template, with so much of ``subprocess.Popen`` as tests use.

    Args:
        work: What the process does: a function of a module.
        arguments: What it is given.
        cwd: Its folder.
        env: What its environment has beside that of this process.
        merged: Its errors go where its output goes.
    """

    def __init__(
        self, work: Callable, *arguments: Any, cwd: Path, env: Mapping[str, str] | None = None, merged: bool = False
    ):
        self.args = arguments
        self._folder = tempfile.TemporaryDirectory(prefix="forked")
        self._out = Path(self._folder.name) / "out"
        self._err = self._out if merged else self._out.with_name("err")
        self._out.touch()
        self._err.touch()
        own = {**os.environ, "OMP_NUM_THREADS": THREADS, **(env or {})}
        what = (str(self._out), str(self._err), str(cwd), own, work, arguments)
        self._process = ready().Process(target=_begin, args=what)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.args), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for its end; all its output, and its errors unless they went there."""
        self.wait(timeout)
        return self._out.read_bytes(), b"" if self._err == self._out else self._err.read_bytes()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def completed(process: Forked, timeout: float = 200) -> subprocess.CompletedProcess:
    """A process that has come to its end, as of ``subprocess.run`` with text; one that does not is killed."""
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())
