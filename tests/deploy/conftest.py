"""Fixtures of the tests of indexes."""

import numpy as np
import pytest
from toys import draw

from metric_kd.deploy import index_part


@pytest.fixture
def folder(tmp_path):
    for k in range(12):
        draw(tmp_path / "images" / "ab"[k % 2] / f"{k:02d}.png", k)
    return tmp_path / "images"


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(index_part, "BLOCK", 4)


@pytest.fixture
def few_for_pq():
    """300 vectors, as PQ needs 256, without 300 files."""
    return np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
