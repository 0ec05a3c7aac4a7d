"""The metrics of several networks side by side, and whether the paper's expectation held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metric_kd.errors import UserError
from metric_kd.quantify.concepts import (
    THRESHOLD,
    Background,
    Counts,
    Empty,
    count_concepts,
    find_concepts,
    learning_simultaneity,
    stability,
    variance,
)


class Estimate(NamedTuple):
    """Mean over images, and its standard error (None where it is not known: one image, or a deviation)."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class MetricRow:
    """One metric of all networks.

    values: network ("teacher", "distilled", "baseline") -> estimate, None where the network cannot give it. more: whether
    the paper expects more of it in the distilled network than in the baseline, None where it expects nothing. held:
    whether that was so; None where it cannot be said. clear: whether the difference is larger than its standard error,
    taken image by image.
    """

    key: str
    title: str
    values: Mapping[str, Estimate | None]
    more: bool | None = None
    held: bool | None = None
    clear: bool | None = None


@dataclass(frozen=True)
class MetricTable:
    """title: which images these are; images: how many."""

    title: str
    images: int
    rows: Sequence[MetricRow]


@dataclass(frozen=True)
class Curve:
    """Means over images at the checkpoints of one network: (K,) each; a network with one checkpoint has K = 1."""

    network: str
    epochs: np.ndarray
    foreground: np.ndarray
    background: np.ndarray
    ratio: np.ndarray


@dataclass(frozen=True)
class EntropyMaps:
    """One image, (H, W, 3) uint8 as the networks saw it, its foreground (S, S) bool, and network -> (S, S) entropy in nats."""

    name: str
    image: np.ndarray
    foreground: np.ndarray
    maps: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Quantified:
    """What is known of one network: its entropies at every checkpoint and how far its weights had moved.

    name: "teacher", "distilled" or "baseline" in the table. epochs: (K,) int, increasing. entropy: (N, K, S, S) nats.
    distance: (E+1,), relative and cumulative (:func:`~metric_kd.quantify.concepts.cumulative_distance`), None where no
    record was kept.
    """

    name: str
    epochs: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray | None = None


class _Metric(NamedTuple):
    """source: which number of every image; statistic: what is made of them; jackknife: its standard error is found by
    leaving out one image at a time, which takes three."""

    key: str
    title: str
    source: str
    more: bool | None
    statistic: Callable[[np.ndarray], float] = np.mean
    jackknife: bool = False


def _deviation(values: np.ndarray) -> float:
    return float(np.sqrt(variance(values)))


METRICS = (
    _Metric("n_fg", "Concepts in the foreground, N_fg", "n_fg", True),
    _Metric("n_bg", "Concepts in the background, N_bg", "n_bg", None),
    _Metric("ratio", "Share of concepts in the foreground, lambda", "ratio", True),
    _Metric("n_fg_peak", "Most foreground concepts of any checkpoint, peak N_fg", "n_fg_peak", None),
    _Metric("d_mean", "Weight distance to most concepts, mean, D_mean", "distance", False),
    _Metric("d_var", "Weight distance to most concepts, variance, D_var", "distance", None, variance, True),
    _Metric("d_std", "Weight distance to most concepts, deviation, D_std", "distance", False, _deviation, True),
    _Metric("rho", "Concepts kept of all ever learned, rho", "rho", True),
)
"""In the order of the table. The paper expects more N_fg, lambda and rho, less D; D_var and the peak say the same again."""


def metric_table(
    title: str,
    networks: Sequence[Quantified],
    foreground: np.ndarray,
    rows: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    background: Background = "dataset",
    empty: Empty = "skip",
) -> MetricTable:
    """The metrics of every network over some of the images, and whether the paper's expectation held.

    foreground: (N, S, S) bool; rows: which of the N images, (M,) indices or (N,) bool; threshold, background, empty: as
    in :mod:`~metric_kd.quantify.concepts`, with the level of "dataset" taken over the chosen images only. N_fg, N_bg and
    lambda are those of each network's last checkpoint. A network with one checkpoint has no peak, D and rho, one without
    a record of its weights no D; a row that no network can have is left out.

    Standard errors: s / sqrt(M) with s of M - 1 degrees for means; for D_var and D_std the jackknife over images,

        sqrt((M - 1)/M sum_i (theta without i  -  mean of those)^2)

    from 3 images on, and not where it vanishes though the values differ. Whether a difference is clear is asked of the same
    errors of its own, image by image. Images without any concept in the foreground, which under "skip" have neither rho
    nor D, are left out of both, and of their differences where either network has none.
    Without images all values are None. Raises ``UserError`` where networks, masks and rows do not fit, or a name is used
    twice.
    """
    rows = _rows(rows, len(foreground))
    names = [network.name for network in networks]
    if len(set(names)) < len(names):
        raise UserError(f"the networks of a table are {', '.join(names)}; give each a name of its own.")
    known = {network.name: _per_image(network, foreground, rows, threshold, background, empty) for network in networks}
    there = [metric for metric in METRICS if any(metric.source in found for found in known.values())]
    return MetricTable(title, len(rows), [_row(metric, known) for metric in there])


def curve(
    network: Quantified,
    foreground: np.ndarray,
    rows: np.ndarray,
    threshold: float = THRESHOLD,
    background: Background = "dataset",
) -> Curve:
    """Mean counts and ratio of some images at every checkpoint of one network; NaN without images.

    foreground, rows, threshold, background: as for :func:`metric_table`, and so are the errors.
    """
    counts, _ = _counted(network, foreground, _rows(rows, len(foreground)), threshold, background)
    means = [each.mean(0) if len(each) else np.full(each.shape[1], np.nan) for each in counts]
    return Curve(network.name, np.asarray(network.epochs), *means)


def unlearned(
    network: Quantified, foreground: np.ndarray, threshold: float = THRESHOLD, background: Background = "dataset"
) -> tuple[int, int]:
    """Of all images, how many never have a concept in the foreground, and how many have most at the first checkpoint."""
    counts, _ = _counted(network, foreground, np.arange(len(foreground)), threshold, background)
    never = counts.foreground.max(1) == 0
    return int(never.sum()), int((~never & (counts.foreground.argmax(1) == 0)).sum())


def _rows(rows: np.ndarray, images: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.dtype == np.bool_:
        if rows.shape != (images,):
            raise UserError(f"a choice of shape {rows.shape} does not fit {images} images; give one entry per image.")
        return np.flatnonzero(rows)
    rows = rows.astype(np.int64) if rows.size == 0 else rows
    whole = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer)
    if not whole or ((rows < 0) | (rows >= images)).any() or len(np.unique(rows)) < len(rows):
        raise UserError(f"chosen images are numbers from 0 to {images - 1}, each once; give such a list.")
    return rows


def _counted(
    network: Quantified, foreground: np.ndarray, rows: np.ndarray, threshold: float, background: Background
) -> tuple[Counts, np.ndarray]:
    """Counts and concepts of the chosen images."""
    if len(network.entropy) != len(foreground) or np.shape(network.entropy)[1:2] != np.shape(network.epochs):
        raise UserError(
            f"{network.name} has entropies of shape {np.shape(network.entropy)} for {len(foreground)} images and "
            f"{np.size(network.epochs)} checkpoints; give one map for each of both."
        )
    concepts = find_concepts(network.entropy[rows], foreground[rows], threshold, background)
    return count_concepts(concepts, foreground[rows]), concepts


def _per_image(
    network: Quantified,
    foreground: np.ndarray,
    rows: np.ndarray,
    threshold: float,
    background: Background,
    empty: Empty,
) -> dict[str, np.ndarray]:
    """source of a metric -> (M,) numbers, of what the network can have."""
    counts, concepts = _counted(network, foreground, rows, threshold, background)
    found = {"n_fg": counts.foreground[:, -1], "n_bg": counts.background[:, -1], "ratio": counts.ratio[:, -1]}
    if len(network.epochs) > 1:
        found["n_fg_peak"] = counts.foreground.max(1)
        found["rho"] = stability(concepts, foreground[rows], empty)
        if network.distance is not None:
            learned = learning_simultaneity(counts.foreground, network.epochs, network.distance)
            never = (counts.foreground.max(1) == 0) & (empty == "skip")
            found["distance"] = np.where(never, np.nan, learned.distances)
    return {source: values.astype(np.float64) for source, values in found.items()}


def _row(metric: _Metric, known: Mapping[str, Mapping[str, np.ndarray]]) -> MetricRow:
    values = {name: _estimate(metric, found.get(metric.source)) for name, found in known.items()}
    ours, theirs = (known.get(name, {}).get(metric.source) for name in ("distilled", "baseline"))
    distilled, baseline = values.get("distilled"), values.get("baseline")
    held = clear = None
    if distilled is not None and baseline is not None and metric.more is not None:
        held = distilled.mean > baseline.mean if metric.more else distilled.mean < baseline.mean
    if ours is not None and theirs is not None:
        clear = _clear(metric, ours, theirs)
    return MetricRow(metric.key, metric.title, values, metric.more, held, clear)


def _estimate(metric: _Metric, values: np.ndarray | None) -> Estimate | None:
    values = values[~np.isnan(values)] if values is not None else np.zeros(0)
    if not len(values):
        return None
    return Estimate(float(metric.statistic(values)), _standard_error(metric, values))


def _clear(metric: _Metric, ours: np.ndarray, theirs: np.ndarray) -> bool | None:
    """Whether the difference is larger than its standard error, over the images that both have."""
    both = ~(np.isnan(ours) | np.isnan(theirs))
    ours, theirs = ours[both], theirs[both]
    error = _standard_error(metric, ours, theirs)
    if error is None:
        return None
    return bool(abs(metric.statistic(ours) - metric.statistic(theirs)) > error)


def _standard_error(metric: _Metric, values: np.ndarray, minus: np.ndarray | None = None) -> float | None:
    """Of the metric, or of its difference between two networks on the same images; None for too few images."""
    count = len(values)
    if count < (3 if metric.jackknife else 2):
        return None
    if not metric.jackknife:
        values = values if minus is None else values - minus
        return float(np.sqrt(variance(values) / (count - 1)))
    without = np.array([metric.statistic(np.delete(values, k)) for k in range(count)])
    apart = float(metric.statistic(values))
    if minus is not None:
        without -= [metric.statistic(np.delete(minus, k)) for k in range(count)]
        apart = max(apart, float(metric.statistic(minus)))
    error = float(np.sqrt((count - 1) * variance(without)))
    # Of two values that are equally frequent, no image changes the deviation more than another: that is no certainty.
    return None if apart > 0 and error <= 1e-9 * apart else error
