"""alone: one process at a time makes a file that others may want to make too."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from metric_kd.errors import UserError
from metric_kd.scratch import open_plain


@contextlib.contextmanager
def alone(file: Path, refusal: str | None = None, lock: Path | None = None) -> Iterator[None]:
    """Hold a lock, ``.FILE.lock`` beside a file by default. Another process waits and says so, or with ``refusal`` raises
    ``UserError(refusal)``.

    The lock dies with its process: unlike flock's, it is not handed to processes that this one forks. Its file is empty; one
    that is not is somebody else's, is held all the same and stays. Links are not followed: they, and all else that is no
    file, raise ``UserError``. Where the system has
    no such locks (Windows, where runs have one process) it is open; where the place has none it raises ``OSError``, or
    with ``refusal`` ``UserError``.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        yield
        return
    lock = lock or file.with_name(f".{file.name}.lock")
    while True:
        handle = open_plain(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            _take(handle, file, refusal)
        except BaseException:
            os.close(handle)
            raise
        if _is(lock, handle):
            break
        os.close(handle)  # whoever held it has removed it: once more
    try:
        yield
    finally:
        if _is(lock, handle) and os.fstat(handle).st_size == 0:
            lock.unlink(missing_ok=True)
        os.close(handle)


def _take(handle: int, file: Path, refusal: str | None) -> None:
    import fcntl

    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the two that say that another process holds it
        if refusal is not None:
            raise UserError(refusal) from error
        print(f"another process is making {file}; waiting for it", file=sys.stderr)
        fcntl.lockf(handle, fcntl.LOCK_EX)
    except OSError as error:
        if refusal is None:
            raise
        raise UserError(f"cannot lock {file} ({error.strerror}); choose a place that has locks.") from error


def _is(path: Path, handle: int) -> bool:
    """Whether an open file still has this name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    return False
