"""One image, however it is given, to RGB uint8: JPEG files by torchvision, the rest by Pillow."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd.data import pillow
from metric_kd.errors import UserError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .qoi .jp2 .j2k .jpf "
    ".jpx .j2c .jpc".split()
)
JPEG = b"\xff\xd8\xff"
MAGIC = (JPEG, b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
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
    try:
        with pillow.open_image(path) as image:
            return image.size
    except Exception as error:  # Pillow raises many types for broken files; each means that it cannot be read
        raise unreadable(path, _reason(error)) from error


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
    """(3, H, W) uint8 RGB, upright by its EXIF orientation; alpha is dropped, deep pixels become 8 bits of their range.

    Raises ``UserError`` that names the file where it is missing, empty, truncated, no image, claims too many pixels, or
    holds numbers of no known range.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise unreadable(path, error.strerror or error) from error
    if data.size == 0:
        raise unreadable(path, "the file is empty")
    if data[:3].tobytes() != JPEG:  # torchvision's other decoders end the process on damaged files
        return _pillow(path)
    try:
        pillow.check_size(*jpeg_size(data))
        from torchvision.io import ImageReadMode, decode_image

        return decode_image(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
    except pillow.Refused as error:
        raise unreadable(path, error) from error
    except (ImportError, RuntimeError):  # Pillow reads a little more, says better what is wrong, and is always there
        return _pillow(path)


def jpeg_size(data: np.ndarray) -> tuple[int, int]:
    """(width, height) of the first frame that a JPEG file claims; (0, 0) where it claims none."""
    view = data.data  # numbers of Python: the search costs a few microseconds
    place, end = 2, len(view) - 9
    while place < end:
        marker = view[place + 1]
        if view[place] != 0xFF or marker == 0xFF:
            place += 1  # bytes between two markers, which the decoder skips
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return view[place + 7] << 8 | view[place + 8], view[place + 5] << 8 | view[place + 6]
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            place += 2
        else:
            place += 2 + (view[place + 2] << 8 | view[place + 3])
    return 0, 0


def pixels_of(image: Any) -> Tensor:
    """(3, H, W) uint8 RGB of one image, the same pixels however it is given.

    image: a file name; a PIL image of any mode, which is turned by its EXIF entry as its file is; an (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4) array of uint8 or uint16, of which the upper 8 bits count; or a (3, H, W) uint8 tensor. An array
    carries no EXIF entry: it is taken as it stands. Raises ``UserError`` for anything else, and for what is damaged.
    """
    if isinstance(image, str | Path):
        return decode(str(image))
    if isinstance(image, Tensor):
        pixels = image
    elif hasattr(image, "convert"):
        try:
            pixels = _planes(pillow.rgb(image))
        except Exception as error:  # as in _pillow: it was opened, but never read
            name = getattr(image, "filename", "") or f"of mode {image.mode} that was given"
            raise unreadable(str(name), _reason(error)) from error
    else:
        pixels = _planes(_colours(np.asarray(image)))
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise UserError(f"an image tensor is (3, H, W) uint8, got {tuple(pixels.shape)} {pixels.dtype}; convert it.")
    if not pixels.numel():
        raise UserError(f"an image has one pixel or more, got {tuple(pixels.shape)}; leave it out.")
    return pixels


def _colours(array: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of an array of grey or coloured pixels."""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        raise UserError(
            f"an image array has shape (H, W, 3), got {array.shape} with the channels first; give "
            "array.transpose(1, 2, 0)."
        )
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        raise UserError(f"an image array has shape (H, W, 3), got {array.shape}; convert it to RGB.")
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise UserError(
            f"an image array holds uint8 (0..255) or uint16 (0..65535), got {array.dtype}; scale it and convert it to uint8."
        )
    array = array if array.dtype == np.uint8 else pillow.narrow(array)
    array = array[..., None] if array.ndim == 2 else array
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]


def _planes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def check_whole(path: str) -> None:
    """Raise ``UserError`` where the image cannot be decoded."""
    decode(path)


def _pillow(path: str) -> Tensor:
    try:
        with pillow.open_image(path) as image:
            return _planes(pillow.rgb(image))
    except Exception as error:  # Pillow raises many types for broken files; each means that it cannot be read
        raise unreadable(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    if "cannot identify" in str(error):
        return "it is no image that we know"
    return str(error) or f"it is damaged: {type(error).__name__}"


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
