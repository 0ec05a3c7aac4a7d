"""The file of a teacher's cache (:mod:`metric_kd.engine.teacher_cache`): making it so that a kill harms nothing, reading it."""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metric_kd import scratch
from metric_kd.durable import sync_folder, umask
from metric_kd.errors import UserError
from metric_kd.plain import opened_hdf5

FORMAT = "metric_kd teacher cache 1"
SAVE_SECONDS = 5.0
"""How long rows are written before the progress is: no more than this is lost by a kill."""


def part_of(file: Path) -> Path:
    """Where a cache lies until it is whole."""
    return file.with_name(f"{file.name}.part")


def check_part(file: Path) -> None:
    """Raise ``UserError`` where something of somebody else lies where the unfinished cache would."""
    scratch.check_part(part_of(file), _is_cache, "teacher cache")


def _is_cache(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as content:
            return str(content.attrs.get("format", "")).startswith("metric_kd teacher cache ")
    except (OSError, RuntimeError, ValueError):
        return False


class Part:
    """``file.part``: a closed HDF5 file of full length, into which rows are written by offset.

    manifest: its attributes; a part with others is begun anew, but for ``made_by``, which is the first's. shapes: data set
    -> (N, V, D), float32. lengths: rows of each section, which are filled one after the other; ``written`` in the file
    counts those that are on the disk, and is written after them. The HDF5 library is not involved any more, so that no
    kill leaves its structures damaged.
    """

    def __init__(
        self,
        file: Path,
        manifest: Mapping[str, str | int],
        shapes: Mapping[str, tuple[int, int, int]],
        lengths: list[int],
    ):
        self.file, self.path, self.shapes = file, part_of(file), dict(shapes)
        self.lengths, self.written = np.array(lengths, dtype="<i8"), np.zeros(len(lengths), dtype="<i8")
        check_part(file)
        scratch.sweep_beside(self.path)
        if not self._open(manifest):
            self._create(manifest)
            self._open(manifest)
        self.handle = os.fdopen(scratch.open_plain(self.path, os.O_RDWR), "r+b")
        self._saved_at = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk has not taken was not counted either
            self.handle.close()

    def _create(self, manifest: Mapping[str, str | int]) -> None:
        import h5py

        size = 4 * sum(int(np.prod(shape)) for shape in self.shapes.values())
        self.path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.file.parent).free
        if size > free:
            raise UserError(
                f"{self.file} needs {size / 2**30:.2f} GiB and {self.file.parent} has {free / 2**30:.2f} GiB free; make room, "
                "give fewer --views, or write it elsewhere."
            )
        handle, new = scratch.create(self.path)
        os.close(handle)
        new.chmod(0o666 & ~umask())
        with h5py.File(new, "w", locking=False) as content:
            content.attrs.update(manifest)
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_layout(h5py.h5d.CONTIGUOUS)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            content["written"], content["lengths"] = np.zeros_like(self.written), self.lengths
            for name, shape in self.shapes.items():
                group = content.require_group(name.rpartition("/")[0] or "/")
                kind, space = h5py.h5t.py_create(np.dtype("<f4")), h5py.h5s.create_simple(shape)
                h5py.h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, early)
        os.replace(new, self.path)

    def _open(self, manifest: Mapping[str, str | int]) -> bool:
        """Whether a part with this manifest and these shapes is there; reads how far it is."""
        try:
            with opened_hdf5(self.path) as content:
                decides = {*manifest} - {"made_by"}
                same = all(content.attrs[key] == manifest[key] for key in decides)
                same = same and np.array_equal(content["lengths"][()], self.lengths)
                if not same or any(content[name].shape != shape for name, shape in self.shapes.items()):
                    return False
                self.written = content["written"][()]
                held = ("written", *self.shapes)
                self.offsets = {name: content[name].id.get_offset() for name in held}
        except (OSError, KeyError, ValueError):
            return False
        return None not in self.offsets.values()

    def put(self, section: int, start: int, rows: Mapping[str, np.ndarray]) -> None:
        """Write rows of a section's data sets, which follow those that are there."""
        for name, values in rows.items():
            self._write(self.offsets[name] + start * 4 * int(np.prod(self.shapes[name][1:])), values.astype("<f4"))
            self.written[section] = start + len(values)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Count the rows written so far, once they lie on the disk."""
        self._flush()
        self._write(self.offsets["written"], self.written)
        self._flush()
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Give the whole cache its name."""
        self.save()
        os.replace(self.path, self.file)
        sync_folder(self.file.parent)

    def _write(self, offset: int, values: np.ndarray) -> None:
        self._try(lambda: self.handle.seek(offset))
        self._try(lambda: self.handle.write(np.ascontiguousarray(values).tobytes()))

    def _flush(self) -> None:
        self._try(self.handle.flush)
        self._try(lambda: os.fsync(self.handle.fileno()))

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}); make room and start again, which goes on."
            ) from error


class Content(NamedTuple):
    """A whole cache: its attributes, its data sets through memory maps, and a digest of all attributes."""

    manifest: dict[str, str | int]
    tables: dict[str, np.ndarray]
    key: str


def read_cache(file: Path) -> Content:
    """Raises ``UserError`` for other, damaged and half-written files. No handle of the HDF5 library stays open."""
    try:
        with opened_hdf5(file) as content:
            held = {key: value if isinstance(value, str) else int(value) for key, value in content.attrs.items()}
            found: dict[str, Any] = {}
            content.visititems(lambda name, item: found.update({name: item}) if getattr(item, "ndim", 0) == 3 else None)
            whole = np.array_equal(content["written"][()], content["lengths"][()])
            places = {name: (table.id.get_offset(), table.shape) for name, table in found.items()}
        if held.get("format") != FORMAT or any(offset is None for offset, _ in places.values()):
            raise UserError(
                f"{file} is no teacher cache of format {FORMAT!r}; give another file, or move this one away."
            )
        if not whole:
            raise UserError(f"{file} is half-written; remove it, and it is made again.")
        tables: dict[str, np.ndarray] = {
            # Copy-on-write: read-only in effect, and torch does not warn.
            name: np.memmap(file, dtype="<f4", mode="c", offset=offset, shape=shape)
            for name, (offset, shape) in places.items()
        }
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"{file} is no teacher cache, or damaged ({reason}); give another file, or move this one away."
        ) from error
    key = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]
    return Content(held, tables, key)
