"""Noise maps of images in networks at many checkpoints, kept in one HDF5 file from which a killed search goes on."""

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from metric_kd.engine.checkpoint import write_atomically
from metric_kd.errors import UserError
from metric_kd.models.layers import reading
from metric_kd.models.network import Network
from metric_kd.plain import opened_hdf5, parse_json
from metric_kd.quantify.discarding import information_discarding, noisy_per_call
from metric_kd.quantify.search import Search
from metric_kd.scratch import is_plain

TOGETHER = 8
"""Images that are searched in one go, or as many as fit one call: a stop loses no more than these."""
PATIENCE = 5.0
"""Seconds between two writings of the file: a kill loses no more than these and one go."""


PIXELS = "pixels at"
"""Beginning of the names of settings that are digests of images."""


class Subject(NamedTuple):
    """One network in training: its name, epoch -> checkpoint, the layer to look at, whether behind a ReLU, and the (N, 3,
    H, W) uint8 images as it sees them."""

    name: str
    checkpoints: Mapping[int, Path]
    layer: str
    relu: bool
    images: Tensor


def is_store(file: Path) -> bool:
    """Whether a file is one of maps, whole and of any settings."""
    import h5py

    try:
        if not is_plain(file):
            return False
        with h5py.File(file, "r") as content:
            return {"settings", "parts"} <= content.attrs.keys()
    except OSError:
        return False


class MapStore:
    """sigma (N, S, S) and unit (N,) of every (network, epoch); see :class:`~metric_kd.quantify.discarding.Discarding`.

    The file is small and replaced whole, so that it is never half-written. shape: (N, S, S). settings: plain values on which
    all maps depend; a file of other settings is refused. parts: those on which some depend; only what the file holds too
    must be equal, so that a network can be added. The maps of a checkpoint also belong to its bytes: where these have
    changed, they are forgotten.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], settings: Mapping[str, Any], parts: Mapping[str, Any]):
        self.path, self.shape = path, shape
        self.settings: dict[str, Any] = {"images": shape[0], **settings}
        self.parts = dict(parts)
        self.sigma: dict[tuple[str, int], np.ndarray] = {}
        self.unit: dict[tuple[str, int], np.ndarray] = {}
        self.digest: dict[tuple[str, int], str] = {}
        self.stamp: dict[tuple[str, int], str] = {}
        self.written = time.monotonic()
        if path.exists():
            self._load()

    def _load(self) -> None:
        try:
            with opened_hdf5(self.path) as file:
                old, parts = (parse_json(file.attrs[name]) for name in ("settings", "parts"))
                for name, group in file.items():
                    for epoch, entry in group.items():
                        key = (name, int(epoch))
                        self.sigma[key], self.unit[key] = entry["sigma"][()], entry["unit"][()]
                        self.digest[key] = str(entry.attrs["checkpoint"])
                        self.stamp[key] = str(entry.attrs["stamp"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{self.path} is no file of maps, or was damaged ({error}); remove it.") from error
        mine = self.settings | {key: value for key, value in self.parts.items() if key in parts}
        theirs = old | {key: value for key, value in parts.items() if key in self.parts}
        for key in [*mine, *theirs]:
            if mine.get(key) != theirs.get(key) and key.startswith(PIXELS):
                raise UserError(
                    f"{self.path.parent} holds maps of other images; give the same --images, --count, --seed and --view, "
                    "another --out, or --resume never to start over."
                )
            if mine.get(key) != theirs.get(key):
                raise UserError(
                    f"{self.path.parent} holds maps with {key} {_short(theirs.get(key))}, these have {_short(mine.get(key))}; "
                    "give another --out, or --resume never to start over."
                )
        self.parts = parts | self.parts

    def prepare(self, name: str, epoch: int, checkpoint: Path) -> np.ndarray:
        """(N,) bool: which images of a checkpoint have no map yet."""
        key, facts = (name, epoch), checkpoint.stat()
        stamp = f"{facts.st_size} {facts.st_mtime_ns}"
        # Networks may be large: their bytes are read again only where the file was written since.
        digest = self.digest[key] if self.stamp.get(key) == stamp else file_digest(checkpoint)
        self.stamp[key] = stamp
        if self.digest.get(key) != digest:
            self.sigma[key] = np.full(self.shape, np.nan, dtype=np.float32)
            self.unit[key] = np.full(self.shape[0], np.nan, dtype=np.float32)
            self.digest[key] = digest
        return np.isnan(self.unit[key])

    def put(self, name: str, epoch: int, rows: Sequence[int], sigma: Tensor, unit: Tensor) -> None:
        """Keep the maps of some images; the file is written every few seconds, and by :meth:`save`."""
        self.sigma[name, epoch][rows] = sigma.numpy()
        self.unit[name, epoch][rows] = np.nan_to_num(unit.numpy(), nan=0.0)
        if time.monotonic() - self.written > PATIENCE:
            self.save()

    def save(self) -> None:
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.attrs["settings"], file.attrs["parts"] = json.dumps(self.settings), json.dumps(self.parts)
            for (name, epoch), sigma in self.sigma.items():
                entry = file.create_group(f"{name}/{epoch}")
                entry["sigma"], entry["unit"] = sigma, self.unit[name, epoch]
                entry.attrs["checkpoint"], entry.attrs["stamp"] = self.digest[name, epoch], self.stamp[name, epoch]
        write_atomically(self.path, lambda out: out.write(buffer.getbuffer()))
        self.written = time.monotonic()

    def of(self, name: str, epochs: Sequence[int]) -> np.ndarray:
        """(N, K, S, S) float64 sigma of a network; NaN for images to which the feature did not answer."""
        return np.stack([self.sigma[name, epoch] for epoch in epochs], 1).astype(np.float64)


def search_missing(
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
            missing = store.prepare(subject.name, epoch, path)
            per_call = batch or noisy_per_call(max(subject.images.shape[2:]), device)
            size = max(TOGETHER, per_call // search.draws)
            for start in range(0, len(missing), size):  # the same images together in every start of the program
                rows = range(start, min(start + size, len(missing)))
                if missing[rows.start : rows.stop].any():
                    todo.append((subject, epoch, path, rows))
    loaded: tuple[Path, nn.Module] | None = None
    total = sum(len(rows) for *_, rows in todo)
    try:
        with _exact(), tqdm(total=total, unit="image", desc="noise maps", disable=not total, mininterval=0.5) as bar:
            for subject, epoch, path, rows in todo:
                bar.set_postfix_str(f"{subject.name}, epoch {epoch}")
                if loaded is None or loaded[0] != path:
                    loaded = (path, load(path).to(device).eval().requires_grad_(False))
                with feature_of(loaded[1], subject.layer) as (feature, scale):
                    found = information_discarding(
                        feature,
                        subject.images[rows.start : rows.stop].to(device),
                        replace(search, relu=subject.relu),
                        scale=scale,
                        seed=seed,
                        keys=rows,
                        batch=batch,
                    )
                store.put(subject.name, epoch, rows, found.sigma, found.unit)
                bar.update(len(rows))
    finally:
        store.save()


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions in full float32: TF32, the default on CUDA, rounds some of the noise away."""
    flags = torch.backends.cudnn
    kept = flags.allow_tf32
    flags.allow_tf32 = False
    try:
        yield
    finally:
        flags.allow_tf32 = kept


@contextmanager
def feature_of(network: nn.Module, layer: str) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor | float]]:
    """(read, scale) for :func:`~metric_kd.quantify.discarding.information_discarding`: sigma is in the network's own
    normalised pixels; of a module without a normalisation of its own, in its input's units."""
    scale = network.rgb_scale if isinstance(network, Network) else 1.0
    with reading(network, layer) as read:
        yield read, scale


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
