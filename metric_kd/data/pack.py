"""A pack: the images of a data set, resized once, in one HDF5 file that is read through a memory map.

Layout (format "metric_kd pack 1"), every data set contiguous and uncompressed:

    images     (N, side, side, 3) uint8: bit for bit what reading the files gives;
    or, for a pack of quality Q, jpeg (B,) uint8 and ends (N,) int64: image k is jpeg[ends[k-1] : ends[k]], not bit-equal
    labels     (N,) int64, rows of class_names (bytes);  paths (N,) bytes, relative to the folder that all images share
    sizes, modified (N,) int64: bytes and nanoseconds of the source files;  readable (N,) uint8
    written    (1,) int64: rows that are in the file, N in a whole pack
    attributes: format, dataset, side, resize, quality (0: pixels), versions (JSON), key (digest of all of this)
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from metric_kd.data import decode
from metric_kd.data.transforms import resize
from metric_kd.errors import UserError
from metric_kd.plain import opened_hdf5, parse_json

FORMAT = "metric_kd pack 1"
RESIZE = "antialiased bilinear, aspect not kept"
COMPARED = 8
"""Images that are decoded again where a pack was made by other versions of the libraries."""


class NoPack(UserError):
    """A file that is no pack, or a damaged one."""


class StalePack(UserError):
    """A pack that does not hold, or no longer, what is asked of it; making it again helps."""


def decode_resized(path: str, side: int) -> np.ndarray:
    """(side, side, 3) uint8 of an image file; raises ``UserError`` that names a file that cannot be read."""
    # A batch of one is made in front, not by [None]: with the strides of that, torch takes the image for planar, and to
    # copy what it gives then takes as long as to resize.
    rows = decode.decode(path).permute(1, 2, 0)[None]
    return resize(rows.permute(0, 3, 1, 2), side)[0].permute(1, 2, 0).numpy()


@lru_cache(1)
def versions() -> dict[str, str]:
    """What decides the bits of a decoded and resized image."""
    found = {"torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()}
    for package in ("torchvision", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


class Located(NamedTuple):
    """A pack, and in which of its rows each of the asked images lies."""

    pack: "Pack"
    rows: np.ndarray


class Packs(Protocol):
    """What a loader asks: one pack, or whatever finds and makes packs (:class:`metric_kd.data.packing.AutoPack`)."""

    def of(self, paths: Sequence[str], side: int) -> Located | None:
        """The pack that holds these images at this side; None: read the files."""
        ...


class Pack:
    """An open pack. No handle of the HDF5 library outlives the constructor, so that processes may fork.

    file, dataset; side: px; quality: of its JPEG images, None where it holds pixels; readable: (N,) bool; key: digest of
    what it was made from. Raises ``NoPack`` for other or damaged files, ``StalePack`` for one that was not finished.
    """

    def __init__(self, file: "str | Path"):
        self.file = Path(file)
        try:
            self._read()
        except UserError:
            raise
        except (OSError, KeyError, ValueError, TypeError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise NoPack(
                f"{file} is no pack, or was damaged ({reason}); give another file, or move this one away."
            ) from error
        self._pixels: np.ndarray | None = None

    def _read(self) -> None:
        with opened_hdf5(self.file) as content:
            about = content.attrs
            if about.get("format") != FORMAT:
                raise NoPack(f"{self.file} is no pack of format {FORMAT!r}; give another file, or move this one away.")
            self.dataset, self.side, self.key = str(about["dataset"]), int(about["side"]), str(about["key"])
            self.quality: int | None = int(about["quality"]) or None
            self.versions: dict[str, str] = parse_json(about["versions"])
            self.names: list[str] = [os.fsdecode(name) for name in content["paths"][()]]
            self.sizes, self.modified = content["sizes"][()], content["modified"][()]
            self.readable: np.ndarray = content["readable"][()].astype(bool)
            written = int(content["written"][0])
            held = content["images" if self.quality is None else "jpeg"]
            self.ends: np.ndarray | None = None if self.quality is None else content["ends"][()]
            joined = self.ends is None or len(held) == self.ends[-1]
            if written != len(self.names) or not joined:
                raise StalePack(
                    f"{self.file} is half-written ({written:,} of {len(self.names):,} images); `metric-kd pack` finishes it."
                )
            self.shape: tuple[int, ...] = held.shape
            self.offset: int | None = held.id.get_offset() if held.size else 0
        if self.offset is None:
            raise NoPack(f"{self.file} is not contiguous (another program has rewritten it); make it again.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def why_unreadable(self) -> str:
        """What is known of an image that is not ``readable``."""
        return f"it could not be when {self.file} was made"

    def __getstate__(self) -> dict[str, Any]:
        """A process that is not forked maps the file itself, instead of getting a copy of it."""
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> np.ndarray:
        """``images`` or ``jpeg`` as they lie in the file, read-only."""
        if self._pixels is None:
            mapped = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.offset or 0, shape=self.shape)
            self._pixels = np.asarray(mapped)  # a plain array: slices of a memmap are slow to make
        return self._pixels

    def image(self, row: int) -> np.ndarray:
        """(side, side, 3) uint8."""
        if self.ends is None:
            return self.pixels[row]
        from torchvision.io import ImageReadMode, decode_jpeg

        start, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
        data = torch.from_numpy(self.pixels[start:end].copy())
        return decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()

    def of(self, paths: Sequence[str], side: int) -> Located:
        """Where these images lie. Raises ``StalePack`` where the pack has another side, lacks one of them, or holds an
        earlier state of one."""
        if side != self.side:
            raise StalePack(
                f"{self.file} holds images of {self.side} px and {side} px are needed here; make another pack "
                f"(metric-kd pack --side {side} --out FILE), or use --pack auto."
            )
        rows = self._locate(paths)
        if self.quality is None and self.versions != versions():
            self._compare(paths, rows)
        return Located(self, rows)

    def _locate(self, paths: Sequence[str]) -> np.ndarray:
        """(N,) int64; files are known by the end of their path, so that data and pack may be moved."""
        whole = [os.path.abspath(path) for path in paths]
        row_of = {name: row for row, name in enumerate(self.names)}
        start = _start(whole[0], row_of) if whole else 0
        prefix = whole[0][:start] if whole else ""
        sizes, modified = self.sizes.tolist(), self.modified.tolist()
        rows = np.empty(len(whole), dtype=np.int64)
        for k, path in enumerate(whole):
            row = row_of.get(path[start:]) if path.startswith(prefix) else None
            if row is None:
                raise StalePack(
                    f"{path} is not in {self.file}, a pack of {self.dataset}: it was added since, or the pack is of other "
                    "data; make it again (metric-kd pack), give another, or use --pack auto."
                )
            state = decode.state_of(path)
            if (state.st_size, state.st_mtime_ns) != (sizes[row], modified[row]):
                raise StalePack(
                    f"{path} has changed since {self.file} was made; make the pack again (metric-kd pack), or use "
                    "--pack auto."
                )
            rows[k] = row
        return rows

    def _compare(self, paths: Sequence[str], rows: np.ndarray) -> None:
        """Raise ``StalePack`` where the libraries of today read a few of the images otherwise than those of the pack."""
        good = np.flatnonzero(self.readable[rows])
        for k in good[np.unique(np.linspace(0, len(good) - 1, COMPARED).astype(int))] if len(good) else ():
            if not np.array_equal(decode_resized(paths[k], self.side), self.pixels[rows[k]]):
                then, now = self.versions, versions()
                changed = next(key for key in now if then.get(key) != now[key])
                raise StalePack(
                    f"{self.file} was made with {changed} {then.get(changed)}, and {now[changed]} reads the images with other "
                    "bits; make the pack again (metric-kd pack), or use --pack auto."
                )


def _start(path: str, names: "dict[str, int]") -> int:
    """Where in an absolute path the name begins by which a pack knows it; its end where it is not known."""
    for place, letter in enumerate(path):
        if letter == os.sep and path[place + 1 :] in names:
            return place + 1
    return len(path)
