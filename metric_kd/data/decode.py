"""One image file to RGB uint8: torchvision where it reads the format, Pillow for the rest."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
PNG = b"\x89PNG\r\n\x1a\n"
MAGIC = (b"\xff\xd8\xff", PNG, b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
T = TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)
CHUNK = 32
"""Files that a thread reads before it reports: the hand-over costs as much as a small image."""


def unreadable(path: str, reason: object) -> UserError:
    """The error about one image file."""
    reason = str(reason).strip().split("\n")[0].rstrip(".")
    return UserError(f"cannot read the image {path} ({reason}); repair or remove it, or use --skip_unreadable.")


def state_of(path: str) -> os.stat_result:
    """Size and times of an image file; raises ``UserError`` that names one that cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error.strerror or error) from error


def check_header(path: str) -> None:
    """Raise ``UserError`` where a file is missing, empty or not an image by its first bytes; this reads 16 of them."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(16)
    except OSError as error:
        raise unreadable(path, error.strerror or error) from error
    if not head:
        raise unreadable(path, "the file is empty")
    if not head.startswith(MAGIC) and not (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        _pillow_size(path)


def _pillow_size(path: str) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow raises many types for broken files; each means that it cannot be read
        raise unreadable(path, "it is no image that we know" if "cannot identify" in str(error) else error) from error


def all_have_size(paths: Sequence[str], size: int) -> bool:
    """Whether every image is ``size x size``; stops at the first that is not. Unreadable files are left for later."""
    for path in paths:
        try:
            if _pillow_size(path) != (size, size):
                return False
        except UserError:
            continue
    return bool(paths)


def decode(path: str) -> Tensor:
    """(3, H, W) uint8 RGB, upright by its EXIF orientation; alpha is dropped, 16 bits become 8.

    Raises ``UserError`` that names the file where it is missing, empty, truncated or no image.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise unreadable(path, error.strerror or error) from error
    if data.size == 0:
        raise unreadable(path, "the file is empty")
    if _for_pillow(data[:32].tobytes()):
        return _pillow(path)
    try:
        from torchvision.io import ImageReadMode, decode_image

        image = decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    except (ImportError, RuntimeError):  # Pillow reads a little more, says better what is wrong, and is always there
        return _pillow(path)
    return image if image.dtype == torch.uint8 else torch.from_numpy((image.numpy() >> 8).astype(np.uint8))


def check_whole(path: str) -> None:
    """Raise ``UserError`` where the image cannot be decoded."""
    decode(path)


def _for_pillow(head: bytes) -> bool:
    """Whether Pillow reads it: all but JPEG and plain PNG (bits packed or palettes have been wrong in torchvision)."""
    if head.startswith(PNG):
        depth, colour = head[24:25], head[25:26]
        return depth < b"\x08" or colour == b"\x03"
    return not head.startswith(b"\xff\xd8\xff")


def _pillow(path: str) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                grey = (np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8)
                upright = Image.fromarray(grey)
            pixels = np.array(upright.convert("RGB"))
    except Exception as error:  # Pillow raises many types for broken files; each means that it cannot be read
        raise unreadable(path, "it is no image that we know" if "cannot identify" in str(error) else error) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def each(function: Callable[[str], T], paths: Sequence[str], what: str, progress: bool) -> Iterator["T | UserError"]:
    """``function`` of every path, in order, from a thread pool; a ``UserError`` is given back, not raised.

    Threads take ``CHUNK`` paths at a time, and wait where the consumer is that far behind.
    """

    def attempt(part: Sequence[str]) -> list[T | UserError]:
        results: list[T | UserError] = []
        for path in part:
            try:
                results.append(function(path))
            except UserError as error:
                results.append(error)
        return results

    parts = [paths[k : k + CHUNK] for k in range(0, len(paths), CHUNK)]
    bar = tqdm(total=len(paths), desc=what, unit="img", leave=False, mininterval=0.5, disable=not progress)
    with bar, ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future] = deque()
        for part in parts:
            waiting.append(pool.submit(attempt, part))
            if len(waiting) >= 2 * THREADS:
                yield from _counted(waiting.popleft().result(), bar)
        while waiting:
            yield from _counted(waiting.popleft().result(), bar)


def _counted(results: list[T], bar: tqdm) -> list[T]:
    bar.update(len(results))
    return results
