"""What shall outlive a crash of the machine: whole writes, and names that are on the disk."""

import os
from pathlib import Path


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk, as after ``os.replace``; what lies under them its writer flushes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The mask of this process, which is set for a moment to be read."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def pwrite_all(handle: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``, however few bytes the system takes at once; a full disk raises ``OSError``."""
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
