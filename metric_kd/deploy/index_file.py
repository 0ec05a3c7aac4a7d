"""The file of an index: a zip archive, uncompressed, of arrays and one description; every member has its checksum.

Members (format "metric_kd index 2"):

    manifest.json   format, count, factory, asked (as given: "auto", or the factory), dimensions, trained, keep_vectors,
                    images (the folder), precision, model, its path, its digest and that of its weights, whether its
                    vectors have length 1
    names           paths in the folder, as bytes, each followed by a zero byte; row k is the k-th
    sizes.npy, modified.npy     (N,) int64: bytes and nanoseconds of the image files when they were listed
    vectors.npy     (N, D) float32 of a Flat index; or what --keep_vectors keeps, float32 or float16
    faiss, ids.npy  of the others: the structure as faiss writes it, and (N,) int64, what it calls each row

No member is pickled, none depends on the clock: the same content is the same file, byte for byte.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from metric_kd.deploy.factory import Factory, parse_factory
from metric_kd.deploy.vector_index import Approximate, Flat, VectorIndex, check_faiss
from metric_kd.engine.checkpoint import write_atomically
from metric_kd.errors import UserError
from metric_kd.evaluation.search import load_faiss
from metric_kd.plain import parse_json

FORMAT = "metric_kd index 2"


class NoIndex(UserError):
    """A file that is no index, or a damaged one."""


@dataclass(frozen=True)
class Files:
    """Image files, in rows: names (relative, as the file system has them), sizes and modified (N,) int64."""

    names: list[str]
    sizes: np.ndarray
    modified: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def select(self, rows: np.ndarray) -> "Files":
        return Files([self.names[row] for row in rows], self.sizes[rows], self.modified[rows])

    def joined(self, other: "Files") -> "Files":
        columns = (np.concatenate(pair) for pair in ((self.sizes, other.sizes), (self.modified, other.modified)))
        return Files(self.names + other.names, *columns)

    def identities(self) -> list[tuple[str, int, int]]:
        """What tells a file from an older one of its name."""
        return list(zip(self.names, self.sizes.tolist(), self.modified.tolist(), strict=True))


@dataclass(frozen=True)
class About:
    """What an index was made of and how. images: the folder, absolute; asked: the factory that was asked for; origin:
    digest of the network that the model is; weights: of its weights, by which its students know their teacher."""

    model_path: str
    model_digest: str
    model: str
    normalised: bool
    images: str
    precision: str
    dimensions: int
    asked: str
    keep_vectors: str | None
    origin: str = ""
    weights: str = ""


@dataclass(frozen=True)
class IndexFile:
    """The content of a file."""

    about: About
    files: Files
    index: VectorIndex


def write_index(path: Path, content: IndexFile) -> None:
    """Write the file whole; a reader sees the old one or the new one."""
    write_atomically(path, lambda file: _write(file, content))


def _write(file: BinaryIO, content: IndexFile) -> None:
    index, files = content.index, content.files
    manifest = {
        "format": FORMAT,
        "metric": "euclidean",
        "count": len(index),
        "factory": str(index.factory),
        "trained": index.trained,
        **asdict(content.about),
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        arrays = {"sizes": files.sizes, "modified": files.modified}
        if isinstance(index, Flat):
            arrays["vectors"] = index.vectors()
        elif isinstance(index, Approximate):
            arrays["ids"] = index.ids
            if index.kept is not None:
                arrays["vectors"] = index.kept
            faiss = load_faiss()
            with _member(archive, "faiss") as member:
                faiss.write_index(index.index, faiss.PyCallbackIOWriter(member.write))
        for name, array in arrays.items():
            with _member(archive, f"{name}.npy") as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        with _member(archive, "names") as member:
            member.write(b"".join(os.fsencode(name) + b"\0" for name in files.names))
        with _member(archive, "manifest.json") as member:
            member.write(json.dumps(manifest, indent=1).encode())


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[Any]:
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
        yield member


def read_index(path: "str | Path") -> IndexFile:
    """Raises ``NoIndex`` for another, a truncated or a damaged file, and ``UserError`` where faiss is needed and absent."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the file that metric-kd index wrote.")
    if not path.is_file():
        raise UserError(f"the index {path} does not exist; make it with metric-kd index, or check the path.")
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = parse_json(archive.read("manifest.json"))
            if manifest["format"] != FORMAT:
                raise NoIndex(
                    f"{path} has format {manifest['format']!r}, this version reads {FORMAT!r}; make it again."
                )
            if (damaged := archive.testzip()) is not None:  # before any of it is given to faiss
                raise NoIndex(f"{path} was damaged ({damaged}); copy it again, or remove it and make it again.")
            return _content(archive, manifest)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read the index {path} ({error.strerror}); permit it.") from error
    except Exception as error:  # a damaged file raises what its bytes lead to: BadZipFile, KeyError, RuntimeError, ...
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise NoIndex(
            f"{path} is no index, or was damaged ({reason}); give another file, or move this one away."
        ) from error


def _content(archive: zipfile.ZipFile, manifest: dict[str, Any]) -> IndexFile:
    held = set(archive.namelist())
    arrays = {}
    for name in ("sizes", "modified", "ids", "vectors"):
        if f"{name}.npy" in held:
            with archive.open(f"{name}.npy") as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    names = [os.fsdecode(name) for name in archive.read("names").split(b"\0")[:-1]]
    factory, count, trained = parse_factory(manifest["factory"]), manifest["count"], manifest["trained"]
    index: VectorIndex
    if factory.kind == "Flat":
        index = Flat(arrays["vectors"])
    else:
        index = Approximate(factory, _faiss_index(archive, factory), arrays["ids"], trained, arrays.get("vectors"))
        if index.index.ntotal != count or index.index.d != manifest["dimensions"]:
            raise ValueError("its parts do not fit")
    if {len(index), len(names), len(arrays["sizes"]), len(arrays["modified"])} != {count}:
        raise ValueError("its parts do not fit")
    about = About(**{name: manifest[name] for name in About.__dataclass_fields__})
    return IndexFile(about, Files(names, arrays["sizes"], arrays["modified"]), index)


def _faiss_index(archive: zipfile.ZipFile, factory: Factory) -> Any:
    check_faiss(factory)
    faiss = load_faiss()
    with archive.open("faiss") as member:
        return faiss.read_index(faiss.BufferedIOReader(faiss.PyCallbackIOReader(member.read)))
