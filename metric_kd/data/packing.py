"""Making packs (:mod:`metric_kd.data.pack`): resumable after any kill, and never a half-written one under its name."""

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metric_kd.data import decode
from metric_kd.data.pack import Located, Pack, StalePack
from metric_kd.data.pack_part import Part, Source, check_part, remove_part
from metric_kd.data.records import ImageRecords
from metric_kd.errors import UserError
from metric_kd.locks import alone

NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.ENOLCK)
"""Errors of a place where no pack can be made, for want of permission, of a folder or of locks."""


def _source(parts: Sequence[ImageRecords]) -> Source:
    """The union of some records; raises ``UserError`` for images in memory and for files that are not there."""
    label_of: dict[str, str] = {}
    for records in parts:
        if records.paths is None:
            raise UserError(f"the images of {records.name} are in memory already; a pack is of image files.")
        for path, label in zip(records.paths, records.labels.tolist(), strict=True):
            label_of.setdefault(os.path.abspath(path), records.class_names[label])
    if not label_of:
        raise UserError("there are no images to pack; check the data folder.")
    paths = list(label_of)
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    class_names = list(dict.fromkeys(label_of.values()))
    number = {name: k for k, name in enumerate(class_names)}
    sizes, modified = (np.empty(len(paths), dtype=np.int64) for _ in range(2))
    for k, path in enumerate(paths):
        state = decode.state_of(path)
        sizes[k], modified[k] = state.st_size, state.st_mtime_ns
    names = [path[len(base) :].lstrip(os.sep) for path in paths]
    labels = np.array([number[label] for label in label_of.values()], dtype=np.int64)
    return Source(parts[0].name, paths, names, labels, class_names, sizes, modified)


def make_pack(
    file: "str | Path",
    parts: Sequence[ImageRecords],
    side: int,
    *,
    quality: int | None = None,
    workers: int = decode.THREADS,
    skip_unreadable: bool = False,
    progress: bool = False,
) -> Pack:
    """The pack of all images of ``parts`` at ``side`` px; a whole and fresh one is left as it is.

    quality: 1 .. 100 keeps JPEG images instead of pixels, smaller but not bit-equal. workers: threads that decode.
    skip_unreadable: mark files that cannot be read, instead of raising the ``UserError`` that names the first. What a
    killed process has written to ``file.part`` is gone on with. Raises ``UserError`` where there is no room for it, where
    ``file`` cannot be written, and where it is something else than a pack of the same data set (by its name, and a path that
    both have) and kind.
    """
    file = Path(file)
    if file.is_dir():
        raise UserError(f"the pack {file} is a folder; give a file, as in {file / 'pack.h5'}.")
    if file.exists() and not file.is_file():
        raise UserError(f"the pack {file} is no file of the usual kind; give another file.")
    if side < 8 or workers < 1 or not (quality is None or 1 <= quality <= 100):
        raise UserError("a pack takes a side of 8 px or more, one or more workers, and a JPEG quality from 1 to 100.")
    source = _source(parts)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file):
            pack = _fresh(file, source, side, quality)
            if pack is not None:
                remove_part(file)
            else:
                check_part(file)
                if not skip_unreadable:
                    for path in source.paths:
                        decode.check_header(path)
                with contextlib.closing(Part(file, source, side, quality)) as part:
                    part.check_room(workers)
                    part.fill(workers, skip_unreadable, progress)
                    part.finish()
                pack = Pack(file)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        reason = f"cannot write {file} ({os.strerror(error.errno)})"
        raise UserError(f"{reason}; make the pack elsewhere (metric-kd pack --out FILE), for --pack FILE.") from error
    if not (skip_unreadable or pack.readable.all()):
        raise decode.unreadable(source.paths[int(pack.readable.argmin())], pack.why_unreadable)
    return pack


def _fresh(file: Path, source: Source, side: int, quality: int | None) -> Pack | None:
    """The pack that lies there, where it is whole and of these files; None where it is to be made (again)."""
    if not file.exists():
        return None
    try:
        pack = Pack(file)
    except StalePack:
        return None
    if pack.dataset != source.dataset:
        raise UserError(f"{file} is a pack of {pack.dataset}, not of {source.dataset}; give another file.")
    if (pack.side, pack.quality) != (side, quality):
        kind = "pixels" if pack.quality is None else f"JPEG images of quality {pack.quality}"
        raise UserError(f"{file} is a pack of {kind} at {pack.side} px; give another file, or remove it.")
    if pack.key != source.key(side, quality):
        if not set(pack.names) & set(source.names):
            raise UserError(
                f"{file} is a pack of other images (the first {pack.names[0]}); give another file, or remove it."
            )
        return None
    try:
        located = pack.of(source.paths, side)
        for row in np.flatnonzero(~pack.readable[located.rows]):  # permitted since, or on a disk that is back
            with contextlib.suppress(UserError):
                decode.check_whole(source.paths[row])
                return None
        return pack
    except StalePack:  # these libraries read the files otherwise
        return None


@dataclass(frozen=True)
class AutoPack:
    """Packs in a folder, found by data set and side: used where they are fresh, made (again) where not.

    parts: gives all records of the data set. make: false reads the files where there is no fresh pack.
    """

    folder: Path
    name: str
    parts: Callable[[], Sequence[ImageRecords]]
    quality: int | None = None
    workers: int = decode.THREADS
    skip_unreadable: bool = False
    progress: bool = False
    make: bool = True

    def file(self, side: int) -> Path:
        """Where the pack of a side lies."""
        return self.folder / f"{self.name}-{side}{'' if self.quality is None else f'-jpeg{self.quality}'}.h5"

    def of(self, paths: Sequence[str], side: int) -> Located | None:
        """See :class:`~metric_kd.data.pack.Packs`."""
        file = self.file(side)
        if file.exists():
            with contextlib.suppress(StalePack):
                located = Pack(file).of(paths, side)
                if self.skip_unreadable or located.pack.readable[located.rows].all():
                    return located
        if not self.make:
            return None
        pack = make_pack(
            file,
            self.parts(),
            side,
            quality=self.quality,
            workers=self.workers,
            skip_unreadable=self.skip_unreadable,
            progress=self.progress,
        )
        return pack.of(paths, side)
