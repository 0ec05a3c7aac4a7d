"""Where an ImageLoader reads: pixels in memory, image files, or a pack."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch

from metric_kd.data import decode
from metric_kd.data.pack import Located, decode_resized
from metric_kd.data.transforms import MEMORY_SIDE, Geometry, resize


def side_of(paths: Sequence[str], geometry: Geometry) -> int:
    """px of the square that these files are made before they are cropped: small ones of the crop's size stay."""
    small = geometry.side <= MEMORY_SIDE
    native = small and geometry.keeps(geometry.crop, geometry.crop) and decode.all_have_size(paths, geometry.crop)
    return geometry.crop if native else geometry.side


class MemoryImages:
    """Batches from (N, H, W, 3) pixels, which are resized here once where they stay small, else batch by batch."""

    decodes = False
    """Whether reading takes so long that threads help."""

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


class FileImages:
    """Batches decoded on demand; the names are one array, so that forked workers do not copy them."""

    decodes = True

    def __init__(self, paths: tuple[str, ...], geometry: Geometry):
        self.names = np.array([os.fsencode(p) for p in paths])
        self.side = geometry.side

    def read(self, rows: np.ndarray, mapping: Callable = map) -> tuple[np.ndarray, np.ndarray]:
        images = mapping(partial(decode_resized, side=self.side), [os.fsdecode(self.names[row]) for row in rows])
        return _filled(images, len(rows), self.side)


class PackImages:
    """Batches from a pack: its pixels through the memory map, or its JPEG images decoded on demand."""

    def __init__(self, located: Located):
        self.pack, self.places = located
        self.side = self.pack.side
        self.decodes = self.pack.quality is not None

    def read(self, rows: np.ndarray, mapping: Callable = map) -> tuple[np.ndarray, np.ndarray]:
        places = self.places[rows]
        if not self.decodes:
            return self.pack.pixels, places
        return _filled(mapping(self.pack.image, places.tolist()), len(rows), self.side)


ImageSource = MemoryImages | FileImages | PackImages


def _filled(images: Iterable[np.ndarray], count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    out = np.empty((count, side, side, 3), dtype=np.uint8)
    for k, image in enumerate(images):
        out[k] = image
    return out, np.arange(count)
