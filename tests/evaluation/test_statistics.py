import math

import numpy as np
import pytest
import torch

from metric_kd.errors import UserError
from metric_kd.evaluation.statistics import bootstrap, merged, paired


def test_the_interval_has_the_width_that_theory_gives():
    hits = torch.tensor([1.0] * 300 + [0.0] * 700)
    found = bootstrap(hits)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.005) and found.high == pytest.approx(0.3 + half, abs=0.005)
    assert bootstrap(hits) == found  # the seed decides
    assert bootstrap(hits, 0.5).high < found.high


def test_queries_without_a_value_are_left_out():
    assert bootstrap(torch.tensor([math.nan, 1.0, 1.0])) == (1.0, 1.0, 1.0)
    one = bootstrap(torch.tensor([0.25]))
    assert one.mean == 0.25 and math.isnan(one.low)
    with pytest.raises(UserError, match="no query"):
        bootstrap(torch.tensor([math.nan]))


def test_paired_counts_exchanges_exactly_where_there_are_few():
    first, second = np.array([1.0, 1, 1, 1, 0]), np.array([0.0, 0, 0, 0, 0])
    found = paired(first, second)
    assert found.difference.mean == pytest.approx(0.8)
    assert found.p == pytest.approx(2 / 2**4)  # all four signs alike, either way; the fifth query says nothing


def test_paired_sees_what_unpaired_figures_hide():
    draw = np.random.default_rng(0)
    hard = draw.random(400)
    one, other = (hard < 0.5).astype(float), (hard < 0.45).astype(float)
    assert paired(one, other).p < 0.001
    assert paired(one, draw.permutation(other)).p > 0.01
    assert paired(one, one) == ((0.0, 0.0, 0.0), 1.0)
    with pytest.raises(UserError, match="same queries"):
        paired(one, other[:3])


def test_seeds():
    found = merged([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high == pytest.approx(2 + 4.302653 / math.sqrt(3))
    assert math.isnan(merged([5.0]).low)
    with pytest.raises(UserError):
        merged([])


def test_one_query_that_differs_says_nothing():
    found = paired(np.array([1.0, 1, 0, 1]), np.array([1.0, 1, 0, 0]))
    assert found.difference.mean == 0.25 and found.p == 1
    assert paired(np.array([1.0]), np.array([0.0])).p == 1
