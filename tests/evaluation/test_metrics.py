"""Recall@K is the hit rate, equal to the reference's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation.metrics import recall, recall_at_k
from metric_kd.types import Neighbours

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "recall.npz"


def test_equals_the_reference():
    golden = np.load(GOLDEN)
    ks = golden["ks"].tolist()
    ours = recall(torch.from_numpy(golden["embeddings"]), torch.from_numpy(golden["labels"]), ks)
    np.testing.assert_allclose([ours[k] for k in ks], golden["recall"], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equals_one_query_at_a_time(hit_rate, seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 12, 90)
    x = draw.standard_normal((90, 6)).astype(np.float32) + draw.standard_normal((12, 6))[labels].astype(np.float32)
    ours = recall(torch.from_numpy(x), torch.from_numpy(labels), [1, 2, 4, 8])
    assert ours == pytest.approx({k: hit_rate(x, labels, k) for k in (1, 2, 4, 8)})
    assert 0.1 < ours[1] < ours[2] < ours[8] < 1


def test_a_class_of_one_image_is_a_miss():
    x = torch.tensor([[0.0], [0.1], [5.0]])
    assert recall(x, torch.tensor([0, 0, 1]), [1, 2]) == {1: 2 / 3, 2: 2 / 3}


def test_missing_neighbours_are_misses():
    found = Neighbours(
        torch.tensor([[1, -1], [1, 0]]),
        torch.tensor([[0.5, torch.inf], [0.1, 0.2]]),
        torch.tensor([7, 3]),
        torch.tensor([7, 3]),  # row 0 would be a hit for the first query
    )
    assert recall_at_k(found, [1, 2]) == {1: 0.5, 2: 0.5}


def test_refuses_more_neighbours_than_searched():
    found = Neighbours(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(UserError, match="needs 4 neighbours and 1 were searched"):
        recall_at_k(found, [1, 4])
    with pytest.raises(UserError, match="larger than the gallery"):
        recall(torch.eye(3), torch.arange(3), [3])
    with pytest.raises(UserError, match="at least one K"):
        recall_at_k(found, [])
