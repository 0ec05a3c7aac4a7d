"""An index in the making: FILE.part, which holds the embeddings that a killed command has computed."""

import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from metric_kd import scratch
from metric_kd.deploy.index_file import Files
from metric_kd.deploy.model import Model
from metric_kd.durable import pwrite_all
from metric_kd.engine.checkpoint import write_atomically
from metric_kd.errors import UserError
from metric_kd.plain import parse_json

MAGIC = b"metric_kd part 1"
BLOCK = 256
"""Images (at least) that are embedded and written before the count is: no more than these is lost by a kill."""
_PAGE = 4096


class Part:
    """Embeddings of ``files`` in rows of fixed size, written by offset; an image that could not be read is a row of NaN.

    Layout: ``MAGIC``, ``written`` (int64: rows that are on the disk, written after them), length of the header (int64), the
    header (JSON: whose embeddings of which files these are), and from the next full page the rows, float32.

    Rows of files that are listed still, unchanged, are taken over when the list has changed since. Raises ``UserError``
    where what is there was begun with another model or folder, unless no row of it was written.
    """

    def __init__(self, file: Path, model: Model, root: str, precision: str, files: Files):
        self.path, self.model, self.root, self.files = part_of(file), model, root, files
        self.header = {"digest": model.digest, "precision": precision, "images": root, "dimensions": model.dimensions}
        self.row = 4 * model.dimensions
        check_part(file)
        there = self._read()
        if there is not None and sorted(there[0].identities()) == sorted(files.identities()):
            self.files = there[0]
        else:
            self._create(there)
        self.handle = scratch.open_plain(self.path, os.O_RDWR)
        self.written, self.offset, _ = _head(self.path)

    def close(self) -> None:
        os.close(self.handle)

    def _read(self) -> tuple[Files, np.ndarray] | None:
        """The files whose rows are there, and all rows; None where there is nothing (or what was cut short)."""
        try:
            written, offset, header = _head(self.path)
            names, sizes, modified = header.pop("names"), header.pop("sizes"), header.pop("modified")
        except (OSError, ValueError, KeyError):
            return None
        if not written:
            return None
        if header != self.header:
            other = "folder" if header.get("images") != self.root else "model or precision"
            raise UserError(
                f"{self.path} holds unfinished work with another {other}; finish it with the command that began it, or "
                "remove it."
            )
        if self.path.stat().st_size < offset + written * self.row:
            return None
        files = Files(names, np.array(sizes, np.int64), np.array(modified, np.int64))
        self.written = written
        return files, _rows(self.path, offset, written, self.model.dimensions)

    def _create(self, there: tuple[Files, np.ndarray] | None) -> None:
        """A part of ``files``, those first whose rows are there."""
        known: dict[tuple[str, int, int], int] = {}
        if there is not None:
            known = {key: row for row, key in enumerate(there[0].identities()[: self.written])}
        keys = self.files.identities()
        done = [k for k, key in enumerate(keys) if key in known]
        self.files = self.files.select(np.array(done + [k for k, key in enumerate(keys) if key not in known], np.int64))
        lists = {
            "names": self.files.names,
            "sizes": self.files.sizes.tolist(),
            "modified": self.files.modified.tolist(),
        }
        header = json.dumps({**self.header, **lists}).encode()
        start = MAGIC + np.array([len(done), len(header)], "<i8").tobytes() + header

        def write(file: BinaryIO) -> None:
            file.write(start + bytes(-len(start) % _PAGE))
            for k in done:
                assert there is not None
                file.write(there[1][known[keys[k]]].tobytes())

        write_atomically(self.path, write)

    def fill(self, batch: int, skip_unreadable: bool, progress: bool) -> None:
        """Embed and write all rows that are missing, block by block, in the batches of an undisturbed command."""
        count, step = len(self.files), batch * -(-BLOCK // batch)
        bar = tqdm(total=count, initial=self.written, desc="embedding", unit="img", leave=False, disable=not progress)
        with bar:
            while self.written < count:
                start, stop = self.written, min(self.written + step, count)
                self._put(start, self._embedded(self.files.names[start:stop], batch, skip_unreadable))
                bar.update(stop - start)

    def _embedded(self, names: list[str], batch: int, skip_unreadable: bool) -> np.ndarray:
        paths = [os.path.join(self.root, name) for name in names]
        skipped: list[str] | None = [] if skip_unreadable else None
        vectors = self.model.embedder.embed(paths, batch, skipped=skipped)
        lost = {str(path) for path in skipped or ()}
        rows = np.full((len(paths), self.model.dimensions), np.nan, np.float32)
        if len(vectors):
            if not np.isfinite(vectors).all():
                raise UserError(
                    "the model gives embeddings that are not finite; use --precision fp32 or another model."
                )
            rows[[path not in lost for path in paths]] = vectors
        return rows

    def _put(self, start: int, rows: np.ndarray) -> None:
        pwrite_all(self.handle, rows.tobytes(), self.offset + start * self.row)
        os.fsync(self.handle)  # the rows lie on the disk before the count that includes them
        self.written = start + len(rows)
        pwrite_all(self.handle, np.array([self.written], "<i8").tobytes(), len(MAGIC))
        os.fsync(self.handle)

    def result(self) -> tuple[Files, np.ndarray, list[str]]:
        """The files that were read, their (M, D) embeddings (a memory map where all were), and the names of the others."""
        rows = _rows(self.path, self.offset, self.written, self.model.dimensions)
        lost = np.isnan(rows[:, 0])
        if not lost.any():
            return self.files, rows, []
        return self.files.select(np.flatnonzero(~lost)), rows[~lost], self.files.select(np.flatnonzero(lost)).names


def part_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def check_part(file: Path) -> None:
    """Raise ``UserError`` where something of somebody else lies where unfinished work would."""
    scratch.check_part(part_of(file), _is_part, "index")


def remove_part(file: Path) -> None:
    """Forget unfinished work; what is of somebody else stays."""
    scratch.remove_part(part_of(file), _is_part)


def _is_part(path: Path) -> bool:
    with open(path, "rb", opener=scratch.open_plain) as file:
        return file.read(len(MAGIC)) == MAGIC


def _head(path: Path) -> tuple[int, int, dict]:
    """Rows written, where rows begin, and the header."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("no part")
        written, length = (int(n) for n in np.frombuffer(file.read(16), "<i8"))
        header = parse_json(file.read(length))
        end = file.tell()
    return written, end + -end % _PAGE, header


def _rows(path: Path, offset: int, count: int, dimensions: int) -> np.ndarray:
    if count == 0:
        return np.empty((0, dimensions), np.float32)
    return np.memmap(path, np.float32, "c", offset, (count, dimensions))  # "c": torch wants what could be written
