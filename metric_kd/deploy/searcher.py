"""Searcher: an index file that answers which of its images are nearest to an image or a vector."""

import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metric_kd.deploy.index_file import read_index
from metric_kd.deploy.measuring import Measured, measure
from metric_kd.deploy.model import Model, open_model
from metric_kd.devices import choose_device
from metric_kd.distances import unit_rows
from metric_kd.errors import UserError


class Hit(NamedTuple):
    """One image that was found: its path and its Euclidean distance from the query, in the model's space."""

    path: str
    distance: float


class Searcher:
    """``Searcher("photos.index").search("query.jpg", k=5)``; safe to call from several threads.

    file: what ``metric-kd index`` wrote. model: the run, checkpoint or exported .onnx file that embeds queries: the one that
    the index remembers (the default), where it has moved or as it was exported, or a student of it that shares its space, by
    its losses (preset compatible) or with ``bridge`` through its stored bridge; vectors need none. images: the folder of the
    images, where it has moved.

    len(searcher): number of images N; ``factory``, ``dimensions``: of the index. Raises ``UserError`` for a file that is no
    index or was damaged, and for ``images`` that are no folder.
    """

    def __init__(
        self,
        file: "str | Path",
        model: "str | Path | None" = None,
        images: "str | Path | None" = None,
        device: str = "auto",
        bridge: bool = False,
    ):
        if bridge and model is None:
            raise UserError(
                "--bridge leads from a student to the model of the index; name the student, as --model RUN."
            )
        if images is not None and not Path(images).is_dir():
            raise UserError(f"--images {images} is no folder; give the one where the images of {file} lie now.")
        self.file, self.device, self.bridge = Path(file), device, bridge
        self._content = read_index(file)
        self.about = self._content.about
        self.factory, self.dimensions = str(self._content.index.factory), self.about.dimensions
        self.images = str(self.about.images if images is None else images)
        self._given, self._lock = model, threading.Lock()
        self._model: Model | None = None

    def __len__(self) -> int:
        return len(self._content.index)

    def search(self, queries: Any, k: int = 10, nprobe: int | None = None, batch: int = 64) -> list[list[Hit]]:
        """For every query its k nearest images, nearest first.

        queries: (Q, D) or (D,) float array or tensor of vectors in the model's space; or images as
        :meth:`metric_kd.deploy.embedder.Embedder.embed` takes them: a file name, a PIL image, or a list of these. nprobe:
        lists to look into (IVF) or candidates to follow (HNSW) instead of the default. One list per query, of k hits, or
        fewer where the lists looked into hold fewer. An image that is in the index finds itself, at a distance of 0.

        Raises ``UserError`` for a k that cannot be, vectors of another length, an unreadable image, or a model that has
        moved or changed.
        """
        check_k(k, len(self))
        vectors = as_vectors(queries)
        if vectors is None:
            vectors = self._embed(queries, batch)
        rows, distances = self.neighbours(vectors, k, nprobe)
        return [
            [Hit(self.path(row), float(far)) for row, far in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), distances.tolist(), strict=True)
        ]

    def neighbours(self, vectors: np.ndarray, k: int = 10, nprobe: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(Q, D) vectors to rows (Q, k) int64 and distances (Q, k) float32; -1 and inf where fewer were found."""
        check_k(k, len(self))
        self.check_nprobe(nprobe)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions:
            raise UserError(
                f"the index holds vectors of length {self.dimensions}, the queries have shape {vectors.shape}; embed both "
                "with one model."
            )
        if not np.isfinite(vectors).all():
            raise UserError("the queries hold values that are not finite; mend them.")
        return self._content.index.search(vectors, k, nprobe)

    def path(self, row: int) -> str:
        """The image of a row."""
        return os.path.join(self.images, self._content.files.names[row])

    def check_nprobe(self, nprobe: int | None) -> None:
        """Raise ``UserError`` for an effort that this index does not know."""
        kind = self._content.index.factory.kind
        if nprobe is not None and kind == "Flat":
            raise UserError("a Flat index compares every vector; leave --nprobe out.")
        if nprobe is not None and nprobe < 1:
            raise UserError(f"--nprobe is {nprobe}; give 1 or more.")

    def model(self) -> Model:
        """The model that embeds queries, opened once. Raises ``UserError`` where its vectors cannot be compared with the
        index's: it is neither the model of the index nor a student in its space."""
        with self._lock:
            if self._model is None:
                self._model = self._open(str(self._given or self.about.model_path))
            return self._model

    def _open(self, path: str) -> Model:
        about = self.about
        way_out = "give the one it was made with as --model" if self._given is None else "give another --model"
        if not Path(path).exists():
            raise UserError(f"the model {path} of {self.file} is not there; {way_out}.")
        precision = "fp32" if Path(path).suffix == ".onnx" else about.precision
        model = open_model(path, str(choose_device(self.device)), precision, self.bridge)
        if model.digest == about.model_digest or (model.origin and model.origin == about.origin):
            return model
        if not about.weights or model.lineage.teacher != about.weights:
            raise UserError(
                f"{path} is neither the model that {self.file} was made with ({about.model}) nor a student of it; {way_out}, "
                "or make the index again."
            )
        if not model.lineage.shared:
            raise UserError(
                f"no loss of {path} ties it to the space of {self.file}, in which it would find things by chance; give "
                "--bridge, for which it is trained with --bridge ridge, or a student of preset compatible."
            )
        return model

    def _embed(self, images: Any, batch: int) -> np.ndarray:
        """(Q, D), of length 1 where the index's vectors are."""
        model = self.model()
        vectors = model.embedder.embed(images, batch)
        if self.about.normalised and not model.normalised:
            return unit_rows(torch.from_numpy(vectors)).numpy()
        return vectors

    def measure(self, nprobe: int | None = None) -> Measured:
        """What the index loses against exact search, and its time and memory."""
        self.check_nprobe(nprobe)
        return measure(self._content.index, nprobe)


def check_k(k: int, count: int) -> None:
    """Raise ``UserError`` where so many neighbours cannot be."""
    if k < 1:
        raise UserError(f"k is {k}; give 1 or more.")
    if k > count:
        raise UserError(f"k is {k}, but the index holds {count} images; choose a smaller k.")


def as_vectors(queries: Any) -> np.ndarray | None:
    """(Q, D) float32, where the queries are vectors: floating numbers in one or two dimensions; None for images."""
    if hasattr(queries, "detach"):
        queries = queries.detach().cpu().numpy()
    if isinstance(queries, np.ndarray) and queries.ndim in (1, 2) and queries.dtype.kind == "f":
        return np.atleast_2d(queries).astype(np.float32)
    return None
