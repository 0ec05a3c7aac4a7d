"""Concepts in entropy maps: how many there are, when they were learned, and how stably; numpy only.

Cheng, Rao, Chen and Zhang, Explaining Knowledge Distillation by Quantifying the Knowledge (CVPR 2020, arXiv
2003.03622). A concept is a cell of an image whose information is discarded clearly less than the background's. What is
marked [M] was recalled from the paper and not read again; the reference is the code that its authors published.

entropy: (N, K, S, S) nats per cell, of N images at K checkpoints; foreground: (N, S, S) bool, the others are background.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

from metric_kd.errors import UserError, one_of

Background = Literal["dataset", "image"]
"""Whose background a cell is compared with: that of all images at this checkpoint, or that of its own image."""

Empty = Literal["skip", "zero"]
"""The stability of an image without any concept: NaN, so that means leave it out, or 0."""

THRESHOLD = 0.2
"""nats; a concept lies further than this below the background's mean entropy."""

EFFECTIVE_SHARE = 110 / 150
"""The last part of the training in which an image has to be effective: from epoch 40 of 150 on."""


class Counts(NamedTuple):
    """Concepts per image and checkpoint: foreground, background (N, K) int64; ratio (N, K), 0 where both are 0."""

    foreground: np.ndarray
    background: np.ndarray
    ratio: np.ndarray


class Simultaneity(NamedTuple):
    """When each image had most concepts, and the mean, variance and deviation over images.

    peak: (N,) int64 epochs; distances: (N,) relative weight distance up to there; mean, var, std: D_mean, D_var and
    D_std of them, NaN without images; slope: (N,) concepts at the peak per unit of distance.
    """

    peak: np.ndarray
    distances: np.ndarray
    mean: float
    var: float
    std: float
    slope: np.ndarray


def background_level(entropy: np.ndarray, foreground: np.ndarray, background: Background = "dataset") -> np.ndarray:
    """Mean entropy of the background, which cells are compared with: (N, K) nats.

        image:    Hbar[n, k] = mean over background cells i of H[n, k, i]     the paper [M]
        dataset:  Hbar[k]    = mean over images n of Hbar[n, k]               the reference, one level per checkpoint

    An image without background cells has NaN under "image" and is left out of the mean under "dataset", which is NaN
    where no image has any. Raises ``UserError`` for an unknown ``background``, shapes that do not fit, and entropies
    that are not finite.
    """
    if background not in get_args(Background):
        raise one_of("background", background, get_args(Background))
    entropy, foreground = _checked(entropy, foreground)
    level = _mean(_flat(entropy), ~_flat(foreground)[:, None])
    if background == "image":
        return level
    present = ~_flat(foreground).all(1)
    if not present.any():
        return np.full_like(level, np.nan)
    whole = _mean(level[present].T, np.ones(int(present.sum()), dtype=bool))
    return np.broadcast_to(whole, level.shape).copy()


def find_concepts(
    entropy: np.ndarray, foreground: np.ndarray, threshold: float = THRESHOLD, background: Background = "dataset"
) -> np.ndarray:
    """Cells whose information is discarded clearly less than the background's: (N, K, S, S) bool.

        concept(i)  iff  Hbar - H_i > threshold     strictly, in foreground and background alike

    with Hbar of :func:`background_level`. Where that is not defined (an image without background under "image", no image
    with any under "dataset") there are no concepts. The paper and the reference use 0.2 nats. Raises ``UserError`` as
    :func:`background_level` does, and for a threshold that is negative or not finite.
    """
    if not (np.isfinite(threshold) and threshold >= 0):
        raise UserError(f"the threshold of a concept is {threshold}; give nats, 0 or more.")
    level = background_level(entropy, foreground, background)
    return level[:, :, None, None] - np.asarray(entropy, dtype=np.float64) > threshold  # NaN is greater than nothing


def count_concepts(concepts: np.ndarray, foreground: np.ndarray) -> Counts:
    """Concepts on the foreground and on the background of each image at each checkpoint, in cells of the grid.

        N_fg = |concepts in foreground|,  N_bg = |concepts in background|,  lambda = N_fg / (N_fg + N_bg)

    concepts: (N, K, S, S) bool. Raises ``UserError`` for shapes that do not fit and masks that are not bool.
    """
    concepts, foreground = _checked(concepts, foreground, kind="concepts")
    inside = (concepts & foreground[:, None]).sum((-2, -1))
    both = concepts.sum((-2, -1))
    return Counts(inside, both - inside, inside / np.maximum(both, 1))


def cumulative_distance(per_epoch: np.ndarray, start: float) -> np.ndarray:
    """How far a weight has moved by the end of each epoch, relative to its norm at the start: (E+1,).

        path:   sum_{j<=k} sum over the steps t of epoch j of ||w_t - w_{t-1}|| / ||w_init||     the reference
        chord:  sum_{j<=k} ||w_j - w_{j-1}|| / ||w_init||, w_j after epoch j                     the paper [M]

    per_epoch: (E+1,), the one or the other of each epoch, not yet divided, with 0 for epoch 0, the start; start:
    ||w_init||. The path is never shorter than the chord. Raises ``UserError`` where ``start`` is not positive, and for
    entries that are negative, not finite, or not 0 at epoch 0.
    """
    per_epoch = np.asarray(per_epoch, dtype=np.float64)
    if not (np.isfinite(start) and start > 0):
        raise UserError(
            f"the weight's norm at the start is {start}, so no distance is relative to it; take another layer."
        )
    if per_epoch.ndim != 1 or not len(per_epoch):
        raise UserError(f"a record of weight distances has one number per epoch, not the shape {per_epoch.shape}.")
    if not (np.isfinite(per_epoch) & (per_epoch >= 0)).all() or per_epoch[0] != 0:
        raise UserError("a weight distance is negative, not finite, or not 0 at epoch 0; record the weights again.")
    return np.cumsum(per_epoch) / start


def learning_simultaneity(counts: np.ndarray, epochs: np.ndarray, cumulative: np.ndarray) -> Simultaneity:
    """How far the weights had moved when each image had most concepts; small means fast, small deviation at once.

        m_n = argmax_k counts[n, k], the first maximum;  d_n = cumulative[epochs[m_n]]
        D_mean = mean_n d_n;  D_var = mean_n (d_n - D_mean)^2;  D_std = sqrt(D_var);  slope_n = counts[n, m_n] / d_n

    counts: (N, K) int, of the foreground (or of the background); epochs: (K,) int, increasing; cumulative: (E+1,) of
    :func:`cumulative_distance`. Raises ``UserError`` where the epochs do not increase or one is not in the record.

    The reference calls the variance D_std, as the paper's equation seems to [M]; here both have their names. Its slope
    divides by 0 where the peak is at epoch 0; here it is 0. Its ResNet curves leave out checkpoint 0 but not so the
    index of the peak, so its d_n there is that of one checkpoint earlier; here it is not. As in the reference, an image
    that never has a concept peaks at the first checkpoint.
    """
    counts, epochs, cumulative = np.asarray(counts), _increasing(epochs), np.asarray(cumulative, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[1] != len(epochs):
        raise UserError(
            f"counts of shape {counts.shape} do not fit {len(epochs)} checkpoints; give one per image and each."
        )
    if epochs[-1] >= len(cumulative):
        raise UserError(
            f"the checkpoint of epoch {epochs[-1]} lies beyond the record of weights, which ends at epoch "
            f"{len(cumulative) - 1}; give the record of the same run."
        )
    first = counts.argmax(1)
    peak = epochs[first]
    distances = cumulative[peak]
    height = counts[np.arange(len(counts)), first].astype(np.float64)
    slope = np.divide(height, distances, out=np.zeros(len(counts)), where=distances > 0)
    var = variance(distances)
    mean = float(distances.mean()) if len(distances) else np.nan
    return Simultaneity(peak, distances, mean, var, float(np.sqrt(var)), slope)


def variance(values: np.ndarray) -> float:
    """Population variance of (N,) values: exactly 0 where all are equal, NaN where there is none."""
    return float(np.var(values - values[0])) if len(values) else np.nan


def stability(concepts: np.ndarray, region: np.ndarray, empty: Empty = "skip") -> np.ndarray:
    """The share of all concepts ever learned that the last checkpoint still has: (N,), 1 for a straight way there.

        rho_n = |S_n(K)| / |union_k S_n(k)|,  S_n(k) = the concepts of image n at checkpoint k within the region

    concepts: (N, K, S, S) bool; region: (N, S, S) bool, which is the foreground in the paper. An image whose union is
    empty has NaN under "skip", and 0 under "zero", as in the reference. Raises ``UserError`` for an unknown ``empty``,
    shapes that do not fit and masks that are not bool.
    """
    if empty not in get_args(Empty):
        raise one_of("empty", empty, get_args(Empty))
    concepts, region = _checked(concepts, region, kind="concepts")
    inside = concepts & region[:, None]
    ever = inside.any(1).sum((-2, -1))
    last = inside[:, -1].sum((-2, -1))
    return np.where(ever > 0, last / np.maximum(ever, 1), np.nan if empty == "skip" else 0.0)


def effective(
    entropy: np.ndarray, foreground: np.ndarray, epochs: np.ndarray, share: float = EFFECTIVE_SHARE
) -> np.ndarray:
    """Images whose foreground keeps at least the background's information, late in training: (N,) bool.

        mean background H - mean foreground H >= 0  at every checkpoint with epoch >= (1 - share) * last epoch

    epochs: (K,) int, increasing. The default is the reference's rule, epoch 40 or later of 150, for runs of any length;
    with a checkpoint after every epoch it is the last 73 % of them. The last checkpoint always counts. An image without
    foreground or without background is not effective. Raises ``UserError`` where the epochs do not fit or do not
    increase, or ``share`` is not in 0..1.

    This selects on what the metrics go on to measure, so counts on these images alone favour the foreground: report
    them on all images as well.
    """
    entropy, foreground = _checked(entropy, foreground)
    epochs = _increasing(epochs)
    if len(epochs) != entropy.shape[1]:
        raise UserError(
            f"the entropies are of {entropy.shape[1]} checkpoints and there are {len(epochs)} epochs; give one each."
        )
    if not 0 <= share <= 1:
        raise UserError(f"the share of the training is {share}; give 0 to 1.")
    late = epochs >= (1 - share) * epochs[-1] - 1e-6  # epochs are whole: a rounded 40.00000001 must not leave out 40
    inside = _flat(foreground)
    maps = _flat(entropy[:, late])
    gain = _mean(maps, ~inside[:, None]) - _mean(maps, inside[:, None])
    return (gain >= 0).all(1)  # NaN, where either is missing, is not


def _flat(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(*maps.shape[:-2], maps.shape[-2] * maps.shape[-1])


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean of the chosen entries of the last axis; NaN where there are none.

    It is taken relative to the first of them, so that equal entries have exactly their value as mean: maps that are
    constant must not be told apart by rounding.
    """
    chosen = np.broadcast_to(chosen, values.shape)
    first = np.take_along_axis(values, chosen.argmax(-1)[..., None], -1)
    count = chosen.sum(-1)
    total = np.where(chosen, values - first, 0.0).sum(-1)
    return np.where(count > 0, first[..., 0] + total / np.maximum(count, 1), np.nan)


def _increasing(epochs: np.ndarray) -> np.ndarray:
    epochs = np.asarray(epochs)
    whole = epochs.ndim == 1 and len(epochs) > 0 and np.issubdtype(epochs.dtype, np.integer)
    if not whole or epochs[0] < 0 or (np.diff(epochs) <= 0).any():
        raise UserError(
            f"the epochs of the checkpoints are {epochs.tolist()}; give whole numbers from 0 on that increase."
        )
    return epochs.astype(np.int64)


def _checked(maps: np.ndarray, region: np.ndarray, kind: str = "entropy") -> tuple[np.ndarray, np.ndarray]:
    """The arrays, ``UserError`` where they do not fit; entropies as float64, whatever they were stored in."""
    maps, region = np.asarray(maps), np.asarray(region)
    if maps.ndim != 4 or 0 in maps.shape[1:]:
        raise UserError(
            f"{kind} has the shape {maps.shape}; give (images, checkpoints, grid, grid), none of the last 0."
        )
    if region.shape != (maps.shape[0], *maps.shape[2:]):
        raise UserError(
            f"a mask of shape {region.shape} does not fit {kind} of shape {maps.shape}; give (images, grid, grid)."
        )
    for name, array in (("mask", region), (kind, maps)):
        if name != "entropy" and array.dtype != np.bool_:
            raise UserError(f"the {name} has the type {array.dtype}; give bool (foreground is > 0).")
    if kind != "entropy":
        return maps, region
    maps = maps.astype(np.float64)
    if not np.isfinite(maps).all():
        raise UserError("entropies are missing or not finite; analyse those images again or leave them out.")
    return maps, region
