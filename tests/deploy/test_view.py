"""What an embedder shows its network is what evaluation shows it."""

import numpy as np
import pytest
import torch
from PIL import Image

from metric_kd.data import Geometry, ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.deploy.embedder import Embedder
from metric_kd.deploy.export import EmbeddingGraph
from metric_kd.models import NetworkSpec, Pixels, build_network


@pytest.mark.parametrize("crop", [32, 80])
@pytest.mark.parametrize("size", [(32, 32), (80, 80), (50, 90)])
def test_one_view_everywhere(tmp_path, crop, size):
    draw = np.random.default_rng(0)
    paths = []
    for k in range(3):
        paths.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
    records = ImageRecords("x", np.array([0, 1, 0]), ("a", "b"), paths=tuple(paths))
    seen = next(ImageLoader(records, Geometry(crop, flip=False)).test(3)).images
    embedder = Embedder(build_network(NetworkSpec("resnet8", 8, True, crop, Pixels())))
    views = torch.stack(embedder._views(paths, None))
    assert torch.equal(views, seen)
    stored = torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths])
    exported = EmbeddingGraph(embedder.network).view(stored)
    assert (exported - seen.float()).abs().max() <= 1
