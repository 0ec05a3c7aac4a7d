import math

import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation.evidence import (
    alignment,
    effective_rank,
    hubness,
    neighbour_overlap,
    per_class,
    rank_biased_overlap,
    uniformity,
)
from metric_kd.types import Neighbours


def lists(rows, gallery=30):
    indices = torch.tensor(rows)
    zeros = torch.zeros(len(indices), dtype=torch.int64)
    return Neighbours(indices, torch.zeros(indices.shape), zeros, torch.zeros(gallery, dtype=torch.int64))


def drawn(q=7, k=6, gallery=10, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(gallery, generator=draw)[:k].tolist() for _ in range(q)]


def test_overlap_by_sets():
    one, other = drawn(seed=1), drawn(seed=2)
    for k in (1, 3, 6):
        expected = [len({*a[:k]} & {*b[:k]}) / k for a, b in zip(one, other, strict=True)]
        assert neighbour_overlap(lists(one), lists(other), k).tolist() == expected
    with pytest.raises(UserError, match="1 to that many"):
        neighbour_overlap(lists(one), lists(other), 7)
    assert neighbour_overlap(lists([[0, -1]]), lists([[0, -1]]), 2).tolist() == [0.5]


def rbo(a, b, p):
    k = len(a)
    shared = [len({*a[:d]} & {*b[:d]}) for d in range(1, k + 1)]
    series = sum(x / d * p**d for d, x in enumerate(shared, start=1))
    return shared[-1] / k * p**k + (1 - p) / p * series


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_rank_biased_overlap_by_its_definition(p):
    one, other = drawn(seed=1), drawn(seed=2)
    expected = [rbo(a, b, p) for a, b in zip(one, other, strict=True)]
    torch.testing.assert_close(
        rank_biased_overlap(lists(one), lists(other), p), torch.tensor(expected, dtype=torch.float64)
    )
    same = rank_biased_overlap(lists(one), lists(one), p)
    torch.testing.assert_close(same, torch.ones(7, dtype=torch.float64))
    top, bottom = lists([[0, 1, 2]]), lists([[0, 8, 9]])
    assert rank_biased_overlap(top, bottom, p) > rank_biased_overlap(top, lists([[7, 8, 2]]), p)
    with pytest.raises(UserError, match="between 0 and 1"):
        rank_biased_overlap(top, bottom, 1.0)


def test_hubness():
    hub = lists([[0, k] for k in range(1, 9)], gallery=9)
    even = lists([[k] for k in range(9)], gallery=9)
    counts = [8, *([1] * 8)]
    mean = sum(counts) / 9
    spread = math.sqrt(sum((c - mean) ** 2 for c in counts) / 9)
    assert hubness(hub, 2) == pytest.approx(sum((c - mean) ** 3 for c in counts) / 9 / spread**3)
    assert hubness(even, 1) == 0


def test_effective_rank():
    axes = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(axes) == pytest.approx(5)
    assert effective_rank(axes[:, :1] @ torch.ones(1, 4)) == pytest.approx(1)
    assert effective_rank(torch.ones(4, 3)) == 0


def test_alignment_and_uniformity_over_pairs():
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 6
    unit = torch.nn.functional.normalize(x).double()
    pairs = [(a, b) for a in range(20) for b in range(20) if a != b]
    same = [float((unit[a] - unit[b]).square().sum()) for a, b in pairs if labels[a] == labels[b]]
    assert alignment(x, labels) == pytest.approx(sum(same) / len(same))
    near = [math.exp(-2 * float((unit[a] - unit[b]).square().sum())) for a, b in pairs]
    assert uniformity(x) == pytest.approx(math.log(sum(near) / len(near)), abs=1e-6)
    assert math.isnan(alignment(x, torch.arange(20)))
    with pytest.raises(UserError):
        uniformity(x[:1])


def test_per_class_leaves_out_what_has_no_value():
    values = torch.tensor([1.0, 0.0, math.nan, 1.0, math.nan])
    assert per_class(values, torch.tensor([4, 4, 4, 9, 7])) == {4: 0.5, 9: 1.0}


def test_a_student_that_answers_zeros_fills_nothing():
    assert uniformity(torch.zeros(6, 3)) == 0
