"""Noise maps of images in networks at many checkpoints, kept in one HDF5 file from which a killed search goes on."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from metric_kd.engine.checkpoint import write_atomically
from metric_kd.errors import UserError
from metric_kd.models.layers import reading
from metric_kd.quantify.discarding import Search, call_size, information_discarding

TOGETHER = 8
"""Images whose maps are written at once: no more than these is lost by a kill."""


class Subject(NamedTuple):
    """One network in training: its name, epoch -> checkpoint, the layer to look at, whether behind a ReLU, and the (N, 3,
    H, W) uint8 images as it sees them."""

    name: str
    checkpoints: Mapping[int, Path]
    layer: str
    relu: bool
    images: Tensor


class MapStore:
    """sigma (N, S, S) and unit (N,) of every (network, epoch); see :class:`~metric_kd.quantify.discarding.Discarding`.

    The file is small and replaced whole, so that it is never half-written. settings: plain values on which the maps
    depend; a file of other settings is refused. A map also belongs to the digest of its checkpoint: where that has
    changed, it is forgotten.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], count: int, grid: int):
        self.path, self.settings, self.shape = path, json.dumps(settings), (count, grid, grid)
        self.sigma: dict[tuple[str, int], np.ndarray] = {}
        self.unit: dict[tuple[str, int], np.ndarray] = {}
        self.digest: dict[tuple[str, int], str] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                stored = str(file.attrs["settings"])
                for name, group in file.items():
                    for epoch, entry in group.items():
                        key = (name, int(epoch))
                        self.sigma[key], self.unit[key] = entry["sigma"][()], entry["unit"][()]
                        self.digest[key] = str(entry.attrs["checkpoint"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path} is no file of maps, or was damaged ({error}); remove it.") from error
        old, new = json.loads(stored), json.loads(self.settings)
        if old != new:
            key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
            raise UserError(
                f"{self.path.parent} holds maps with {key} {_short(old.get(key))}, these have {_short(new.get(key))}; "
                "give another --out, or --resume never to start over."
            )

    def prepare(self, name: str, epoch: int, digest: str) -> np.ndarray:
        """(N,) bool: which images of a checkpoint have no map yet."""
        key = (name, epoch)
        if self.digest.get(key) != digest:
            self.sigma[key] = np.full(self.shape, np.nan, dtype=np.float32)
            self.unit[key] = np.full(self.shape[0], np.nan, dtype=np.float32)
            self.digest[key] = digest
        return np.isnan(self.unit[key])

    def put(self, name: str, epoch: int, rows: Sequence[int], sigma: Tensor, unit: Tensor) -> None:
        """Keep the maps of some images, and write the file."""
        self.sigma[name, epoch][rows] = sigma.numpy()
        self.unit[name, epoch][rows] = np.nan_to_num(unit.numpy(), nan=0.0)
        self.save()

    def save(self) -> None:
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.attrs["settings"] = self.settings
            for (name, epoch), sigma in self.sigma.items():
                entry = file.create_group(f"{name}/{epoch}")
                entry["sigma"], entry["unit"] = sigma, self.unit[name, epoch]
                entry.attrs["checkpoint"] = self.digest[name, epoch]
        write_atomically(self.path, lambda out: out.write(buffer.getbuffer()))

    def of(self, name: str, epochs: Sequence[int]) -> np.ndarray:
        """(N, K, S, S) float64 sigma of a network; NaN for images to which the feature did not answer."""
        return np.stack([self.sigma[name, epoch] for epoch in epochs], 1).astype(np.float64)


def fill(
    store: MapStore,
    subjects: Sequence[Subject],
    search: Search,
    load: Callable[[Path], nn.Module],
    *,
    device: torch.device,
    seed: int = 0,
    batch: int | None = None,
) -> None:
    """Search all maps that are missing, a few images at a time, with a bar that tells what is left."""
    todo = []
    for subject in subjects:
        for epoch, path in subject.checkpoints.items():
            missing = store.prepare(subject.name, epoch, file_digest(path))
            side = max(subject.images.shape[2:])
            size = max(TOGETHER, (batch or call_size(side)) // search.draws)
            for start in range(0, len(missing), size):  # the same images together in every start of the program
                rows = range(start, min(start + size, len(missing)))
                if missing[rows.start : rows.stop].any():
                    todo.append((subject, epoch, path, rows))
    loaded: tuple[Path, nn.Module] | None = None
    total = sum(len(rows) for *_, rows in todo)
    with tqdm(total=total, unit="image", desc="noise maps", disable=not total, mininterval=0.5) as bar:
        for subject, epoch, path, rows in todo:
            bar.set_postfix_str(f"{subject.name}, epoch {epoch}")
            if loaded is None or loaded[0] != path:
                loaded = (path, load(path).to(device).eval())
            with feature_of(loaded[1], subject.layer) as (feature, scale):
                found = information_discarding(
                    feature,
                    subject.images[rows.start : rows.stop].to(device),
                    Search(**{**vars(search), "relu": subject.relu}),
                    scale=scale,
                    seed=seed,
                    keys=rows,
                    batch=batch,
                )
            store.put(subject.name, epoch, rows, found.sigma, found.unit)
            bar.update(len(rows))


@contextmanager
def feature_of(network: nn.Module, layer: str) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor | float]]:
    """(read, scale) for :func:`~metric_kd.quantify.discarding.information_discarding`: sigma is in the network's own
    normalised pixels; of a module without a normalisation of its own, in its input's units."""
    scale = getattr(network, "pixel_scale", 1.0)
    pixels = getattr(getattr(network, "spec", None), "pixels", None)
    if isinstance(scale, Tensor) and pixels is not None and pixels.bgr:
        scale = scale.flip(1)
    with reading(network, layer) as read:
        yield read, scale


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
