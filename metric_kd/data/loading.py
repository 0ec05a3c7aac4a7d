"""ImageLoader: records and geometry to uint8 batches, from memory or from files."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metric_kd.data import decode
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry, resize
from metric_kd.errors import UserError
from metric_kd.types import Batch

MEMORY_SIDE = 73
"""Images up to this side live in memory: what inputs of 64 px need before the crop (64 * 256 / 224)."""

Request = tuple[np.ndarray, int | None]
"""Rows of the records, and the epoch to augment for; None for the test view."""


class _MemoryImages:
    """Batches from (N, H, W, 3) pixels, which are resized here once where they stay small, else batch by batch."""

    def __init__(self, pixels: np.ndarray, geometry: Geometry):
        self.resizes = not geometry.keeps(*pixels.shape[1:3])
        self.side = geometry.side if self.resizes else pixels.shape[1]
        if self.resizes and self.side <= MEMORY_SIDE:
            parts = [self._resized(pixels[k : k + 1024]) for k in range(0, len(pixels), 1024)]
            pixels, self.resizes = np.concatenate(parts), False
        self.pixels = np.ascontiguousarray(pixels)

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        return resize(torch.from_numpy(pixels).permute(0, 3, 1, 2), self.side).permute(0, 2, 3, 1).numpy()

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels, and where in them each of the rows lies."""
        if self.resizes:
            return self._resized(self.pixels[rows]), np.arange(len(rows))
        return self.pixels, rows


class _FileImages:
    """Batches decoded on demand; the names are one array, so that forked workers do not copy them."""

    def __init__(self, paths: tuple[str, ...], geometry: Geometry):
        self.names = np.array([os.fsencode(p) for p in paths])
        self.side = geometry.side

    def read(self, rows: np.ndarray, mapping: Callable = map) -> tuple[np.ndarray, np.ndarray]:
        out = np.empty((len(rows), self.side, self.side, 3), dtype=np.uint8)
        images = mapping(partial(_decode_resized, side=self.side), [os.fsdecode(self.names[row]) for row in rows])
        for k, image in enumerate(images):
            out[k] = image
        return out, np.arange(len(rows))


def _decode_resized(path: str, side: int) -> np.ndarray:
    return resize(decode.decode(path)[None], side)[0].permute(1, 2, 0).numpy()


class _Batches:
    """Request -> Batch; what a worker process holds."""

    def __init__(self, source: "_MemoryImages | _FileImages", labels: np.ndarray, geometry: Geometry, seed: int):
        self.source, self.labels, self.geometry, self.seed = source, labels, geometry, seed

    def make(self, request: Request, **reading: Callable) -> Batch:
        rows, epoch = request
        pixels, places = self.source.read(rows, **reading)
        side = self.source.side
        if epoch is None:
            crops = self.geometry.centre(len(rows), side)
        else:
            crops = self.geometry.draw(self.seed, epoch, rows, side)
        images, teacher_images = self.geometry.views(self.geometry.cut(pixels, places, crops))
        labels = torch.from_numpy(self.labels[rows])
        return Batch(images, labels, torch.from_numpy(np.array(rows)), teacher_images=teacher_images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> "Batch | str":
        """A user error travels as its sentence: raised in a worker, it would arrive with a traceback inside."""
        try:
            return self.make(request)
        except UserError as error:
            return str(error)


class _Agenda:
    """The requests of the epoch at hand; a sampler that persistent workers ask again every epoch."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(list(self.requests))


def _start_worker(_: int) -> None:
    """Workers leave signals to the trainer: Ctrl-C reaches the whole group, and SIGTERM's handler is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(results: object) -> None:
    """End the worker processes behind an iterator of a DataLoader; torch has no public name for it."""
    shut_down = getattr(results, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _as_it_is(batch: "Batch | str") -> "Batch | str":
    return batch


class ImageLoader:
    """uint8 batches of ``records`` as ``geometry`` wants them, the same for any number of workers.

    Images that need no more than ``MEMORY_SIDE`` px before the crop are decoded once and kept in memory; larger ones
    are decoded on demand, in ``workers`` processes or, without them, in threads.

    seed: of the augmentation. skip_unreadable: decode everything once, drop what cannot be read and list it in
    ``skipped``; otherwise ``UserError`` names the first such file, here where its first bytes show it, else when it is
    met. pin_memory: for asynchronous copies to a GPU; ignored without one. records: those in use, without the skipped.
    side: px of the square that an image is made before it is cropped.
    """

    def __init__(
        self,
        records: ImageRecords,
        geometry: Geometry,
        *,
        seed: int = 0,
        workers: int = 0,
        skip_unreadable: bool = False,
        pin_memory: bool = False,
        progress: bool = False,
    ):
        if len(records) == 0:
            raise UserError(f"{records.name} holds no images; check the data folder.")
        self.geometry = replace(geometry, flip=geometry.flip and records.flip)
        self.skipped: list[str] = []
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.records = records
        if records.pixels is None:
            records = self._from_files(records, skip_unreadable, progress)
        source: _MemoryImages | _FileImages
        if records.pixels is not None:
            source = _MemoryImages(records.pixels, self.geometry)
        else:
            assert records.paths is not None
            source = _FileImages(records.paths, self.geometry)
        self.side = source.side
        self.workers = workers if isinstance(source, _FileImages) else 0
        self._batches = _Batches(source, np.ascontiguousarray(self.records.labels, dtype=np.int64), self.geometry, seed)
        self._agenda = _Agenda()
        self._pool: DataLoader | None = None
        self._busy = False

    def __len__(self) -> int:
        return len(self.records)

    def _from_files(self, records: ImageRecords, skip: bool, progress: bool) -> ImageRecords:
        """What to draw from: pixels where the images are small, else the paths. Sets ``records`` and ``skipped``."""
        paths = records.paths
        assert paths is not None
        crop = self.geometry.crop
        small = self.geometry.side <= MEMORY_SIDE
        native = small and self.geometry.keeps(crop, crop) and decode.all_have_size(paths, crop)
        side = crop if native else self.geometry.side
        pixels = np.empty((len(paths), side, side, 3), dtype=np.uint8) if small else None
        read: Callable[[str], object]
        if small:
            read, what = partial(_decode_resized, side=side), "decode images"
        elif skip:
            read, what = decode.check_whole, "check images"
        else:
            read, what = decode.check_header, "check images"
        good = np.ones(len(paths), dtype=bool)
        for k, result in enumerate(decode.each(read, paths, what, progress)):
            if isinstance(result, UserError):
                if not skip:
                    raise result
                good[k] = False
                self.skipped.append(paths[k])
            elif pixels is not None:
                pixels[k] = result
        if not good.any():
            raise UserError(f"none of the {len(paths)} images of {records.name} can be read; check the data folder.")
        if not good.all():
            self.records = records = records.select(good, renumber=False)  # a classifier keeps its classes
            pixels = pixels[good] if pixels is not None else None
        return replace(records, paths=None, pixels=pixels) if pixels is not None else records

    def train(self, index_batches: Iterable[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Augmented batches of the given rows; the augmentation depends on seed, epoch and row only."""
        return self._run([(np.asarray(rows), epoch) for rows in index_batches], keep=True)

    def test(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, centre view; the last batch may be short."""
        starts = range(0, len(self), batch_size)
        return self._run([(np.arange(s, min(s + batch_size, len(self))), None) for s in starts], keep=False)

    def example(self, count: int) -> Batch:
        """The test view of the first ``count`` images."""
        return self._batches.make((np.arange(min(count, len(self))), None))

    def close(self) -> None:
        """Stop the workers now. Left to the garbage collector, they may take ten seconds to notice."""
        if self._pool is not None:
            _stop(self._pool._iterator)
            self._pool = None

    def _run(self, requests: list[Request], keep: bool) -> Iterator[Batch]:
        if self.workers == 0:
            yield from self._here(requests)
        elif keep and not self._busy:
            if self._pool is None:
                self._pool = self._workers(self._agenda, persistent=True)
            self._agenda.requests = requests
            self._busy = True
            try:
                yield from map(self._checked, self._pool)
            except Exception:
                self.close()
                raise
            finally:
                self._busy = False
        else:  # tests, and a second epoch while one is open, get processes of their own
            agenda = _Agenda()
            agenda.requests = requests
            results = iter(self._workers(agenda, persistent=False))
            try:
                yield from map(self._checked, results)
            finally:
                _stop(results)

    def _here(self, requests: list[Request]) -> Iterator[Batch]:
        if isinstance(self._batches.source, _FileImages):
            with ThreadPoolExecutor(decode.THREADS) as pool:
                for request in requests:
                    yield self._pinned(self._batches.make(request, mapping=pool.map))
        else:
            for request in requests:
                yield self._pinned(self._batches.make(request))

    def _workers(self, agenda: _Agenda, persistent: bool) -> DataLoader:
        return DataLoader(
            self._batches,  # type: ignore[arg-type]
            sampler=agenda,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            persistent_workers=persistent,
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(0),  # or it would take numbers from the global one
        )

    @staticmethod
    def _checked(result: "Batch | str") -> Batch:
        if isinstance(result, str):
            raise UserError(result)
        return result

    def _pinned(self, batch: Batch) -> Batch:
        return Batch(*(_pin(t) for t in batch)) if self.pin_memory else batch


def _pin(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.pin_memory()
