"""A pack in the making (:mod:`metric_kd.data.packing`): what lies on the disk between two kills."""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from metric_kd import scratch
from metric_kd.data.pack import FORMAT, RESIZE, decode_resized, versions
from metric_kd.durable import pwrite_all, sync_folder, umask
from metric_kd.errors import UserError
from metric_kd.plain import opened_hdf5, parse_json

BLOCK = 128
"""Images that are decoded and written before the progress is: no more than these is lost by a kill."""
SAMPLED = 8
"""Images whose JPEG files tell how much room all of them will need."""


class Source(NamedTuple):
    """All images of a data set, every one once, and what is known of their files without reading them."""

    dataset: str
    paths: list[str]
    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    sizes: np.ndarray
    modified: np.ndarray

    def key(self, side: int, quality: int | None) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, self.dataset, side, quality or 0, RESIZE]).encode())
        digest.update(b"\0".join(os.fsencode(name) for name in self.names))
        for column in (self.sizes, self.modified, self.labels):
            digest.update(column.tobytes())
        digest.update(b"\0".join(os.fsencode(name) for name in self.class_names))
        return digest.hexdigest()[:32]


def _files(file: Path) -> tuple[Path, Path]:
    """What lies beside ``file`` while it is made: the part, and its JPEG images."""
    return file.with_name(f"{file.name}.part"), file.with_name(f"{file.name}.jpeg.part")


def check_part(file: Path) -> None:
    """Raise ``UserError`` where something of somebody else lies where the unfinished pack would."""
    part, blobs = _files(file)
    scratch.check_part(part, _is_pack, "pack")
    scratch.check_part(blobs, lambda path: _has_jpeg(part) or _has_jpeg(file), "pack")


def remove_part(file: Path) -> None:
    """Forget an unfinished pack; what is of somebody else stays."""
    part, blobs = _files(file)
    for path in (part, blobs):
        scratch.sweep_beside(path)
    scratch.remove_part(blobs, lambda path: _has_jpeg(part) or _has_jpeg(file))  # first: the other tells whose they are
    scratch.remove_part(part, _is_pack)


def _is_pack(path: Path) -> bool:
    """Whether a file is a pack, whole or not, of this version or another."""
    return str(_attributes(path).get("format", "")).startswith("metric_kd pack ")


def _has_jpeg(path: Path) -> bool:
    """Whether a file is a pack of JPEG images, which lie beside it until it is whole."""
    return _is_pack(path) and _attributes(path).get("quality", 0) != 0


def _attributes(path: Path) -> dict[str, Any]:
    import h5py

    if not scratch.is_plain(path):
        return {}
    try:
        with h5py.File(path, "r", locking=False) as content:
            return dict(content.attrs)
    except (OSError, RuntimeError, ValueError):
        return {}


class Part:
    """A pack in the making, ``file.part``: a closed HDF5 file of full length, into which rows are written by offset.

    ``written`` in it counts the rows that are on the disk; it is written after them. The HDF5 library is not involved
    any more, so that there is no moment at which a kill leaves its structures damaged. JPEG images, whose length is not
    known before, grow in ``file.jpeg.part`` and are copied at the end.
    """

    def __init__(self, file: Path, source: Source, side: int, quality: int | None):
        self.file, self.source, self.side, self.quality = file, source, side, quality
        self.path, self.blobs = _files(file)
        check_part(file)
        for path in (self.path, self.blobs):
            scratch.sweep_beside(path)
        if not self._open():
            remove_part(file)
            os.replace(self._create(0), self.path)
            self._open()
        self.handle = scratch.open_plain(self.path, os.O_RDWR)
        self.jpeg = None if quality is None else scratch.open_plain(self.blobs, os.O_CREAT | os.O_RDWR)

    def close(self) -> None:
        os.close(self.handle)
        if self.jpeg is not None:
            os.close(self.jpeg)

    def _create(self, length: int) -> Path:
        """Write a pack without its rows, with room for ``length`` bytes of JPEG images, as a scratch file."""
        import h5py

        source, count = self.source, len(self.source.paths)
        handle, new = scratch.create(self.path)
        os.close(handle)
        new.chmod(0o666 & ~umask())
        with h5py.File(new, "w", locking=False) as content:
            content.attrs.update(
                format=FORMAT,
                dataset=source.dataset,
                side=self.side,
                resize=RESIZE,
                quality=self.quality or 0,
                versions=json.dumps(versions()),
                key=source.key(self.side, self.quality),
            )
            content["paths"] = np.array([os.fsencode(name) for name in source.names])
            content["class_names"] = np.array([os.fsencode(name) for name in source.class_names])
            content["labels"], content["sizes"], content["modified"] = source.labels, source.sizes, source.modified
            rows: dict[str, tuple[tuple[int, ...], str]] = {"written": ((1,), "<i8"), "readable": ((count,), "u1")}
            if self.quality is None:
                rows["images"] = ((count, self.side, self.side, 3), "u1")
            else:
                rows |= {"ends": ((count,), "<i8"), "jpeg": ((length,), "u1")}
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_layout(h5py.h5d.CONTIGUOUS)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            for name, (shape, kind) in rows.items():
                kind_id = h5py.h5t.py_create(np.dtype(kind))
                h5py.h5d.create(content.id, name.encode(), kind_id, h5py.h5s.create_simple(shape), early)
        _write(new, {offset: bytes(8) for offset in [self._offsets(new)["written"]]})
        return new

    @staticmethod
    def _offsets(path: Path) -> dict[str, int]:
        with opened_hdf5(path) as content:
            held = ("written", "readable", "images", "ends", "jpeg")
            return {name: content[name].id.get_offset() or 0 for name in held if name in content}

    def _open(self) -> bool:
        """Whether ``file.part`` is there and of these files, side and versions; reads how far it is."""
        try:
            with opened_hdf5(self.path) as content:
                same = content.attrs["key"] == self.source.key(self.side, self.quality)
                if not same or parse_json(content.attrs["versions"]) != versions():
                    return False
                self.written = int(content["written"][0])
                self.ends: np.ndarray | None = content["ends"][()] if self.quality is not None else None
            self.offsets = self._offsets(self.path)
        except (OSError, KeyError, ValueError):
            return False
        end = int(self.ends[self.written - 1]) if self.ends is not None and self.written else 0
        return end == 0 or (self.blobs.exists() and self.blobs.stat().st_size >= end)

    def check_room(self, workers: int) -> None:
        """Raise ``UserError`` where the disk has no room for the rest."""
        left = len(self.source.paths) - self.written
        if self.quality is None:
            rest = len(self.source.paths) * self.side**2 * 3 - self.path.stat().st_blocks * 512
        else:  # beside the copy at the end
            sampled = np.linspace(0, len(self.source.paths) - 1, SAMPLED if left else 0)
            with ThreadPoolExecutor(workers) as pool:
                lengths = [
                    len(e)
                    for e in pool.map(self._encoded, np.unique(sampled.astype(int)))
                    if not isinstance(e, UserError)
                ]
            held = self.blobs.stat().st_size if self.blobs.exists() else 0
            rest = held + int(2.4 * left * float(np.mean(lengths or [0])))
        free = shutil.disk_usage(self.file.parent).free
        if rest > free:
            if not self.written:
                remove_part(self.file)
            way_out = "" if self.quality is not None else " or keep JPEG images (--jpeg 95)"
            raise UserError(
                f"the pack needs {rest / 2**30:.2f} GiB and {self.file.parent} has {free / 2**30:.2f} GiB free; make room, "
                f"write it elsewhere{way_out}."
            )

    def _encoded(self, row: int) -> "bytes | UserError":
        """The bytes of one row."""
        try:
            pixels = decode_resized(self.source.paths[row], self.side)
        except UserError as error:
            return error
        if self.quality is None:
            return pixels.tobytes()
        from torchvision.io import encode_jpeg

        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return encode_jpeg(image, self.quality).numpy().tobytes()

    def fill(self, workers: int, skip_unreadable: bool, progress: bool) -> None:
        """Decode and write all rows that are missing, block by block."""
        count = len(self.source.paths)
        bar = tqdm(
            total=count,
            initial=self.written,
            desc=f"pack {self.source.dataset}",
            unit="img",
            leave=False,
            mininterval=0.5,
            disable=not progress,
        )
        with bar, ThreadPoolExecutor(workers) as pool:
            while self.written < count:
                rows = range(self.written, min(self.written + BLOCK, count))
                block = list(pool.map(self._encoded, rows))
                for found in block:
                    if isinstance(found, UserError) and not skip_unreadable:
                        raise found
                self._put(rows, block)
                bar.update(len(rows))

    def _put(self, rows: range, block: "list[bytes | UserError]") -> None:
        start, readable = rows.start, bytes(not isinstance(found, UserError) for found in block)
        pwrite_all(self.handle, readable, self.offsets["readable"] + start)
        if self.ends is None:
            size = self.side**2 * 3
            pixels = b"".join(bytes(size) if isinstance(found, UserError) else found for found in block)
            pwrite_all(self.handle, pixels, self.offsets["images"] + start * size)
        else:
            assert self.jpeg is not None
            blobs = [b"" if isinstance(found, UserError) else found for found in block]
            begin = int(self.ends[start - 1]) if start else 0
            self.ends[start : rows.stop] = begin + np.cumsum([len(blob) for blob in blobs])
            pwrite_all(self.jpeg, b"".join(blobs), begin)
            os.fsync(self.jpeg)
            pwrite_all(self.handle, self.ends[start : rows.stop].tobytes(), self.offsets["ends"] + 8 * start)
        os.fsync(self.handle)  # the rows lie on the disk before the count that includes them
        self.written = rows.stop
        pwrite_all(self.handle, np.array([self.written], "<i8").tobytes(), self.offsets["written"])

    def finish(self) -> None:
        """Give the whole pack its name."""
        os.fsync(self.handle)
        if self.ends is not None:
            self._join(int(self.ends[-1]))
        os.replace(self.path, self.file)
        self.blobs.unlink(missing_ok=True)
        sync_folder(self.file.parent)

    def _join(self, length: int) -> None:
        """``file.part`` with the JPEG images in it; only then does it replace the one without."""
        assert self.ends is not None
        whole = self._create(length)
        offsets = self._offsets(whole)
        with whole.open("r+b") as target, self.blobs.open("rb") as blobs:
            target.seek(offsets["jpeg"])
            while length:  # not all of the file: behind the last image a kill may have left half of another
                piece = blobs.read(min(length, 1 << 22))
                target.write(piece)
                length -= len(piece)
        columns = {
            "readable": os.pread(self.handle, len(self.ends), self.offsets["readable"]),
            "ends": self.ends.tobytes(),
            "written": np.array([len(self.ends)], "<i8").tobytes(),
        }
        _write(whole, {offsets[name]: data for name, data in columns.items()})
        os.replace(whole, self.path)


def _write(path: Path, pieces: "dict[int, bytes]") -> None:
    """Bytes at offsets of a file, on the disk when this returns."""
    handle = os.open(path, os.O_RDWR)
    try:
        for offset, data in pieces.items():
            pwrite_all(handle, data, offset)
        os.fsync(handle)
    finally:
        os.close(handle)
