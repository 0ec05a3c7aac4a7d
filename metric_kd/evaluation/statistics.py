"""How sure a figure is: intervals over queries, paired tests between two networks, and several seeds as one figure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from metric_kd.errors import UserError

RESAMPLES = 2000
AT_ONCE = 1 << 22
"""Numbers that are resampled at a time (32 MiB)."""


class Interval(NamedTuple):
    """A mean, and where it lies with the given confidence; low and high are NaN where one value says nothing of that."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """difference: mean of the first minus the second, with its interval; p: two-sided, of no difference at all."""

    difference: Interval
    p: float


def bootstrap(values: Tensor | np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean over queries with its percentile bootstrap interval; queries are what is drawn again.

    values: (Q,), one per query, as 1 and 0 for hits; NaN (a query that has no value) is left out. It says how much the
    figure would move with other queries of the same kind, not with another training run: for that see :func:`merged`.
    Raises ``UserError`` where no value is left.

    Efron: Bootstrap Methods: Another Look at the Jackknife, 1979; scipy.stats.bootstrap does it.
    """
    from scipy import stats

    kept = _values(values)
    if len(kept) == 1 or kept.min() == kept.max():
        return Interval(float(kept.mean()), *((float("nan"),) * 2 if len(kept) == 1 else (kept[0], kept[0])))
    found = stats.bootstrap(
        (kept,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, AT_ONCE // len(kept)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return Interval(float(kept.mean()), float(low), float(high))


def paired(first: Tensor | np.ndarray, second: Tensor | np.ndarray, level: float = 0.95, seed: int = 0) -> Paired:
    """Whether two networks differ on the same queries: the mean difference, its bootstrap interval, and a permutation test.

    first, second: (Q,), one per query; queries without a value in either (NaN) are left out. The p-value is the share of
    random exchanges of the two within queries that give a difference at least as large. Raises ``UserError`` where the
    lengths differ or nothing is left.

    Fisher: The Design of Experiments, 1935; scipy.stats.permutation_test does it.
    """
    from scipy import stats

    one, other = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if one.shape != other.shape or one.ndim != 1:
        raise UserError(f"a paired test compares the same queries; got {one.shape} and {other.shape} values.")
    gaps = _values(one - other)
    difference = bootstrap(gaps, level, seed)
    gaps = gaps[gaps != 0]  # queries on which both agree change nothing
    if len(gaps) < 2:  # a single one may be turned round half the time
        return Paired(difference, 1.0)
    found = stats.permutation_test(
        (gaps,),
        np.sum,
        permutation_type="samples",
        n_resamples=5 * RESAMPLES,
        batch=max(1, AT_ONCE // len(gaps)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return Paired(difference, float(found.pvalue))


def merged(values: Sequence[float], level: float = 0.95) -> Interval:
    """Several seeds as one figure: their mean and its interval by Student's t, which with two or three seeds is wide.

    A single seed has no interval (NaN). Raises ``UserError`` for none.
    """
    from scipy import stats

    kept = np.asarray(values, dtype=np.float64)
    if len(kept) == 0:
        raise UserError("there are no seeds to merge; give the result of one or more.")
    mean = float(kept.mean())
    if len(kept) == 1:
        return Interval(mean, float("nan"), float("nan"))
    reach = float(stats.t.ppf((1 + level) / 2, len(kept) - 1) * kept.std(ddof=1) / np.sqrt(len(kept)))
    return Interval(mean, mean - reach, mean + reach)


def _values(values: Tensor | np.ndarray) -> np.ndarray:
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if kept.ndim != 1 or len(kept) == 0:
        raise UserError("there is no query with a value; check the labels.")
    return kept
