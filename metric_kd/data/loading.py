"""ImageLoader: records and geometry to uint8 batches, from memory, from files or from a pack."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metric_kd.data import decode
from metric_kd.data.pack import Located, Packs, decode_resized
from metric_kd.data.records import ImageRecords
from metric_kd.data.sources import MEMORY_SIDE, FileImages, ImageSource, MemoryImages, PackImages, side_of
from metric_kd.data.transforms import Crops, Geometry
from metric_kd.data.views import Views
from metric_kd.errors import UserError
from metric_kd.types import Batch

Request = tuple[np.ndarray, int | np.ndarray | None]
"""Rows of the records, and the epoch to augment for, or which fixed view of each; None for the test view."""


class _Batches:
    """Request -> Batch; what a worker process holds."""

    def __init__(self, source: ImageSource, labels: np.ndarray, geometry: Geometry, seed: int, views: Views | None):
        self.source, self.labels, self.geometry, self.seed, self.views = source, labels, geometry, seed, views
        self.seen_by = geometry  # whose images a batch holds

    def make(self, request: Request, **reading: Callable) -> Batch:
        rows, shown = request
        different: np.ndarray = rows
        place: np.ndarray | slice = slice(None)
        if isinstance(shown, np.ndarray):  # several views of an image are cut from one decoding
            different, place = np.unique(rows, return_inverse=True)
        pixels, places = self.source.read(different, **reading)
        crops, views = self._crops(rows, shown)
        images, teacher_images = self.seen_by.views(self.geometry.cut(pixels, places[place], crops))
        labels, indices = torch.from_numpy(self.labels[rows]), torch.from_numpy(np.array(rows))
        return Batch(images, labels, indices, None if views is None else torch.from_numpy(views), teacher_images)

    def _crops(self, rows: np.ndarray, shown: int | np.ndarray | None) -> tuple[Crops, np.ndarray | None]:
        """Where the images are cut, and which fixed views these are."""
        side = self.source.side
        if shown is None:
            return self.geometry.centre(len(rows), side), None
        if self.views is None:
            assert isinstance(shown, int)
            return self.geometry.draw(self.seed, shown, rows, side), None
        views = self.views.shown(self.seed, shown, rows) if isinstance(shown, int) else shown
        return self.views.crops(self.geometry, views, rows, side), views

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
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


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

    pack: a :class:`~metric_kd.data.pack.Pack`, or what finds one, to read instead of the files, with the same batches bit
    for bit (unless it holds JPEG images); ``UserError`` where it does not hold the files as they are now.
    seed: of the augmentation. skip_unreadable: decode everything once, drop what cannot be read and list it in
    ``skipped``; otherwise ``UserError`` names the first such file, here where its first bytes show it, else when it is
    met. pin_memory: for asynchronous copies to a GPU; ignored without one. records: those in use, without the skipped.
    side: px of the square that an image is made before it is cropped. pack: the one that is read, or None.
    views: the fixed views in which alone training shows the images; None: new ones in every epoch.
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
        pack: Packs | None = None,
        views: Views | None = None,
    ):
        if len(records) == 0:
            raise UserError(f"{records.name} holds no images; check the data folder.")
        self.geometry = replace(geometry, flip=geometry.flip and records.flip)
        self.skipped: list[str] = []
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.records = records
        source = self._source(pack, skip_unreadable, progress)
        self.side = source.side
        self.pack = source.pack if isinstance(source, PackImages) else None
        self.workers = 0 if isinstance(source, MemoryImages) else workers
        self.views = views
        labels = np.ascontiguousarray(self.records.labels, dtype=np.int64)
        self._batches = _Batches(source, labels, self.geometry, seed, views)
        self._agenda = _Agenda()
        self._pool: DataLoader | None = None
        self._busy = False

    def __len__(self) -> int:
        return len(self.records)

    def _source(self, pack: Packs | None, skip: bool, progress: bool) -> ImageSource:
        """Where batches come from. Sets ``records`` and ``skipped``."""
        paths = self.records.paths
        if paths is None:
            if pack is not None:
                raise UserError(f"the images of {self.records.name} are in memory already; leave the pack out.")
            assert self.records.pixels is not None
            return MemoryImages(self.records.pixels, self.geometry)
        side = side_of(paths, self.geometry)
        located = None if pack is None else pack.of(paths, side)
        if located is not None:
            return self._from_pack(located, skip)
        pixels = self._from_files(side, skip, progress)
        if pixels is not None:
            return MemoryImages(pixels, self.geometry)
        assert self.records.paths is not None
        return FileImages(self.records.paths, self.geometry)

    def _from_pack(self, located: Located, skip: bool) -> PackImages:
        good = located.pack.readable[located.rows]
        assert self.records.paths is not None
        if not (skip or good.all()):
            path = self.records.paths[int(good.argmin())]
            raise decode.unreadable(path, located.pack.why_unreadable)
        self._keep(good)
        return PackImages(located._replace(rows=located.rows[good]))

    def _from_files(self, side: int, skip: bool, progress: bool) -> np.ndarray | None:
        """The pixels where the images are small, ``side`` px each, else None."""
        paths = self.records.paths
        assert paths is not None
        small = self.geometry.side <= MEMORY_SIDE
        pixels = np.empty((len(paths), side, side, 3), dtype=np.uint8) if small else None
        read: Callable[[str], Any]
        if small:
            read, what = partial(decode_resized, side=side), "decode images"
        elif skip:
            read, what = decode.check_whole, "check images"
        else:
            read, what = decode.check_header, "check images"
        good = np.ones(len(paths), dtype=bool)
        result: Any
        for k, result in enumerate(decode.each(read, paths, what, progress)):
            if isinstance(result, UserError):
                if not skip:
                    raise result
                good[k] = False
            elif pixels is not None:
                pixels[k] = result
        self._keep(good)
        return pixels if pixels is None or good.all() else pixels[good]

    def _keep(self, good: np.ndarray) -> None:
        """Leave the other images out, and list them."""
        if good.all():
            return
        records = self.records
        assert records.paths is not None
        self.skipped = [records.paths[k] for k in np.flatnonzero(~good)]
        if not good.any():
            raise UserError(f"none of the {len(good)} images of {records.name} can be read; check the data folder.")
        self.records = records.select(good, renumber=False)  # a classifier keeps its classes

    def train(self, index_batches: Iterable[np.ndarray], epoch: int) -> Iterator[Batch]:
        """Augmented batches of the given rows; augmentation, or the choice of a view, depends on seed, epoch and row only."""
        return self._run([(np.asarray(rows), epoch) for rows in index_batches], keep=True)

    def test(self, batch_size: int, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """All images in order, centre view; the last batch may be short. part (k, n): the k-th run of n of these batches."""
        starts = range(0, len(self), batch_size)
        starts = starts[len(starts) * part[0] // part[1] : len(starts) * (part[0] + 1) // part[1]]
        return self._run([(np.arange(s, min(s + batch_size, len(self))), None) for s in starts], keep=False)

    def example(self, count: int) -> Batch:
        """The first ``count`` images: their test view or, of a loader with fixed views, their first."""
        return self.first_view(np.arange(min(count, len(self))))

    def first_view(self, rows: np.ndarray) -> Batch:
        """The test view of each of the rows or, of a loader with fixed views, the first."""
        return self.fixed(rows, None if self.views is None else np.zeros_like(rows))

    def fixed(self, rows: np.ndarray, views: np.ndarray | None) -> Batch:
        """The given fixed view of each of the rows, or with None the test view."""
        return self._batches.make((rows, views))

    def every_view(self, parts: Iterable[np.ndarray]) -> Iterator[Batch]:
        """Of each array of rows one batch: row by row all fixed views or, of a loader without such, the test view."""
        if self.views is None:
            return self._run([(rows, None) for rows in parts], keep=False)
        every = np.arange(self.views.count)
        return self._run([(np.repeat(rows, len(every)), np.tile(every, len(rows))) for rows in parts], keep=False)

    def forget_teacher(self) -> None:
        """From now on batches are the student's alone; what the student sees stays the same. Not within an epoch."""
        self._batches.seen_by = Geometry(self.geometry.input_size)
        self.close()  # the workers have a copy of what was

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
        if self._batches.source.decodes:
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
            collate_fn=_as_it_is,  # type: ignore[arg-type]
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
        return Batch(*(_pin(t) for t in batch)) if self.pin_memory else batch  # type: ignore[arg-type]


def _pin(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.pin_memory()
