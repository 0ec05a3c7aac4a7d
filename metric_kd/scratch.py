"""Files that lie beside a result while it is made: which of them are ours, so that no other is written or removed."""

import contextlib
import glob
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from metric_kd.errors import UserError

END = ".metric_kd.part"
"""How the names of our scratch files end: ``.NAME.xxxxxxxx.metric_kd.part`` beside NAME."""
_RANDOM = "?" * 8
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def create(path: Path) -> tuple[int, Path]:
    """A new file that nobody else has, beside ``path`` and under its name: (handle, its path)."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=END)
    return handle, Path(scratch)


def sweep_beside(path: Path) -> None:
    """Remove what killed processes left of :func:`create` on this path; for the one process that writes it."""
    for half_written in path.parent.glob(f".{glob.escape(path.name)}.{_RANDOM}{END}"):
        if is_plain(half_written):
            half_written.unlink(missing_ok=True)


def is_scratch(name: str, of: str) -> bool:
    """Whether a name is one that :func:`create` gives beside a file named ``of``."""
    return re.fullmatch(rf"\.{re.escape(of)}\..{{{len(_RANDOM)}}}{re.escape(END)}", name) is not None


def is_plain(path: Path) -> bool:
    """Whether a file of the usual kind has this name: no link to one, no folder, pipe or device."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def open_plain(path: "Path | str", flags: int, mode: int = 0o666) -> int:
    """``os.open`` that never follows a link, never waits, and raises ``UserError`` for all but files of the usual kind.

    It can be the ``opener`` of ``open``, in the modes r, r+ and a.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _in_the_way(Path(path))
    handle = os.open(path, flags | _CAREFUL | getattr(os, "O_CLOEXEC", 0), mode)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _in_the_way(Path(path))
    return handle


def check_part(path: Path, is_ours: Callable[[Path], bool], what: str) -> bool:
    """Whether unfinished work of ours lies at ``path``; raises ``UserError`` where something else does.

    An empty file counts as ours: it may be the first trace of a killed process, and nothing is lost with it.
    """
    try:
        state = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(state.st_mode):
        raise _in_the_way(path)
    if state.st_size == 0 or is_ours(path):
        return True
    raise UserError(f"{path} is no unfinished {what} of this program; move it away, or write elsewhere.")


def remove_part(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Remove unfinished work of ours; what is of somebody else stays."""
    if is_plain(path) and (path.stat().st_size == 0 or is_ours(path)):
        path.unlink(missing_ok=True)


def _in_the_way(path: Path) -> UserError:
    what = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "no file of the usual kind"
    return UserError(f"{path} is {what}, where a file is to be written; move it away, or write elsewhere.")
