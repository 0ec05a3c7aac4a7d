"""Embeddings that another program wrote: FILE.npy, one row per image, and FILE.csv with the images' paths."""

import csv
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metric_kd.errors import UserError

CHUNK = 1 << 22
"""Numbers that are read at once to look for those that are not finite."""


class Vectors(NamedTuple):
    """values: (M, D) floating point, through a memory map; names: M different paths, relative to a folder of any name."""

    file: Path
    values: np.ndarray
    names: tuple[str, ...]

    def digest(self) -> str:
        """16 hex digits over names and values."""
        digest = hashlib.sha256("\0".join(self.names).encode())
        digest.update(str((self.values.shape, self.values.dtype.str)).encode())
        for part in _chunks(self.values):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()[:16]

    def rows(self, paths: "tuple[str, ...]", root: "str | Path") -> np.ndarray:
        """(N,) int64: where the vector of each image lies; ``root``: the data folder in which the images are.

        The names may be relative to that folder, to one in it or to one above it, but to the same for all images. Raises
        ``UserError`` that names the first image without a vector, and where two folders fit.
        """
        row_of = {name: row for row, name in enumerate(self.names)}
        relative = [_slashes(os.path.relpath(path, root)) for path in paths]
        found = [self._locate(relative, row_of, cut, add) for cut, add in self._places(relative[0], row_of)]
        whole = [rows for rows in found if (rows >= 0).all()]
        if len(whole) > 1:
            raise UserError(
                f"the images of {root} fit two folders of {self._table}; write there only the paths of one of them."
            )
        if whole:
            return whole[0]
        rows = max(found, key=lambda rows: int((rows >= 0).sum()), default=np.full(len(paths), -1))
        missing = np.flatnonzero(rows < 0)
        raise UserError(
            f"{self._table} has no vector for {paths[missing[0]]} ({len(missing):,} of {len(paths):,} images have none); "
            "embed all training images, and write their paths relative to the data folder."
        )

    @property
    def _table(self) -> Path:
        return self.file.with_suffix(".csv")

    def _places(self, first: str, row_of: "dict[str, int]") -> "list[tuple[str, str]]":
        """(what to cut from the front of every path, what to put there): the ways in which the first image has a name."""
        parts = first.split("/")
        for start in range(len(parts)):
            if "/".join(parts[start:]) in row_of:
                return [("/".join([*parts[:start], ""]), "")]
        return [("", name[: -len(first)]) for name in self.names if name.endswith("/" + first)] or [("", "")]

    @staticmethod
    def _locate(paths: "list[str]", row_of: "dict[str, int]", cut: str, add: str) -> np.ndarray:
        """(N,) int64, -1 where there is no such name."""
        return np.array([row_of.get(add + p.removeprefix(cut), -1) if p.startswith(cut) else -1 for p in paths])


def read_vectors(file: "str | Path") -> Vectors:
    """The vectors in ``file`` and their paths in the table of the same name beside it (header ``path``).

    Raises ``UserError`` where either is missing or no such file, they are of different lengths, a path is empty or stands
    there twice, or a number is not finite.
    """
    file = Path(file)
    values, names = _values(file), _names(file.with_suffix(".csv"))
    if len(names) != len(values):
        raise UserError(
            f"{file} holds {len(values):,} vectors and {file.with_suffix('.csv')} {len(names):,} paths; write one path for "
            "each vector, in the same order, below the header `path`."
        )
    row_of: dict[str, int] = {}
    for row, name in enumerate(names):
        if row_of.setdefault(name, row) != row:
            raise UserError(f"{file.with_suffix('.csv')} names {name} twice; leave one of its vectors.")
    start = 0
    for part in _chunks(values):
        finite = np.isfinite(part).all(1)
        if not finite.all():
            raise UserError(
                f"the vector of {names[start + int(finite.argmin())]} in {file} is not finite; leave the image out or embed "
                "it again."
            )
        start += len(part)
    return Vectors(file, values, tuple(names))


def _values(file: Path) -> np.ndarray:
    try:
        # Copy-on-write: read-only in effect, and torch does not warn.
        values: np.ndarray = np.load(file, mmap_mode="c", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; check the path.") from error
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"{file} is no array ({reason}); write it with numpy.save, or with `metric-kd embed`."
        ) from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or not values.size or values.dtype.kind != "f":
        raise UserError(f"{file} holds no (N, D) array of floating point numbers; write one row per image.")
    usual = values.dtype.isnative and values.dtype.itemsize <= 8
    return values if usual else values.astype(np.float32)


def _names(file: Path) -> "list[str]":
    if not file.is_file():
        raise UserError(f"{file} does not exist; write the paths of the images there, below the header `path`.")
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines)
            if "path" not in (table.fieldnames or []):
                raise UserError(f"{file} has no column `path`; write that header above the paths of the images.")
            names = []
            for line in table:
                if not (line["path"] or "").strip():
                    raise UserError(
                        f"{file}, row {table.line_num} has no path; write that of its image, or remove the row and its vector."
                    )
                names.append(_slashes(os.path.normpath(line["path"])))
            return names
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no UTF-8 CSV file ({error}); save it as one.") from error


def _chunks(values: np.ndarray) -> "list[np.ndarray]":
    step = max(1, CHUNK // values.shape[1])
    return [values[start : start + step] for start in range(0, len(values), step)]


def _slashes(path: str) -> str:
    return path.replace(os.sep, "/").replace("\\", "/").lstrip("/")
