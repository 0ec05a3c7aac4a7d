"""A model without a network, folders of small pictures, and what an index of them must hold."""

import os
import time

import numpy as np
from PIL import Image

from metric_kd.deploy.index_file import read_index
from metric_kd.deploy.lineage import Lineage
from metric_kd.deploy.model import Model
from metric_kd.errors import UserError

FACTORIES = ["Flat", "IVF4,Flat", "IVF2,PQ4", "HNSW8"]


class Toy:
    """An image's embedding: eight of its pixels' values. It counts what it embeds."""

    def __init__(self, pause=0.0):
        self.seen, self.pause = [], pause

    def embed(self, images, batch=64, progress=False, skipped=None):
        rows = []
        for path in images:
            try:
                pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)
            except OSError:
                if skipped is None:
                    raise UserError(f"cannot read the image {path}.") from None
                skipped.append(path)
                continue
            rows.append(pixels.reshape(-1)[:8] / 255)
            self.seen.append(os.path.basename(path))
            time.sleep(self.pause)
        return np.array(rows, np.float32).reshape(-1, 8)


def toy(digest="d", pause=0.0):
    return Model(Toy(pause), "/nowhere/run", digest, 8, "toy", False, "", "w", Lineage())


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def slow_oracle(vectors, query, k):
    far = np.array([np.sqrt(((v.astype(np.float64) - query) ** 2).sum()) for v in vectors])
    order = np.argsort(far, kind="stable")[:k]
    return order, far[order]


def expected(folder):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    return {name: Toy().embed([folder / name])[0] for name in names}


def holds(file, folder):
    """That the index holds the folder as it is: every image once, found at distance 0 by its own vector, no other."""
    content = read_index(file)
    right = expected(folder)
    assert sorted(content.files.names) == sorted(right)
    vectors = content.index.vectors()
    for row, name in enumerate(content.files.names):
        np.testing.assert_array_equal(vectors[row], right[name])
        rows, far = content.index.search(right[name][None], 1, 4)
        assert rows[0, 0] == row and far[0, 0] == 0
    return content
