"""alone: one process at a time makes a file that others may want to make too."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from metric_kd.errors import UserError


@contextlib.contextmanager
def alone(file: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold ``.FILE.lock`` beside a file. Another process waits and says so, or with ``refusal`` raises ``UserError(refusal)``.

    The lock dies with its process. Where the system has no such locks (Windows, where runs have one process) it is open.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    lock = file.with_name(f".{file.name}.lock")
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if refusal is not None:
                os.close(handle)
                raise UserError(refusal) from error
            print(f"another process is making {file}; waiting for it", file=sys.stderr)
            fcntl.lockf(handle, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # whoever held it has removed it: once more
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
