"""Fixed views: V crops and flips of every training image, drawn once for all epochs, so that a teacher can be asked once."""

from dataclasses import dataclass

import numpy as np

from metric_kd.data.transforms import Crops, Geometry, uniform

CHOICE = 3
"""Which draw of an image and epoch chooses its view: the first three place and mirror crops."""


@dataclass(frozen=True)
class Views:
    """``count`` views of every image; view v of row i is what an ordinary run with this seed shows of it in epoch v.

    seed: of the crops; not that of a run, so that runs of several seeds share their views.
    """

    count: int
    seed: int = 0

    def shown(self, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
        """(N,) int64: the view of each row that a run of ``seed`` shows in an epoch, floor(count * u(seed, epoch, row))."""
        u = uniform(seed, epoch, rows, CHOICE + 1)[:, CHOICE]
        return np.minimum((u * self.count).astype(np.int64), self.count - 1)

    def crops(self, geometry: Geometry, views: np.ndarray, rows: np.ndarray, side: int) -> Crops:
        """Where the given view of each row cuts images of ``side`` px: a function of seed, view and row alone."""
        top, left = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        flip = np.empty(len(rows), dtype=bool)
        for view in np.unique(views):
            of_it = np.flatnonzero(views == view)
            top[of_it], left[of_it], flip[of_it] = geometry.draw(self.seed, int(view), rows[of_it], side)
        return Crops(top, left, flip)
