"""Concepts and what is counted of them: pinned numbers, loops over cells, and the degenerate cases."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pinned import arrays, assert_close

from metric_kd.errors import UserError
from metric_kd.quantify.concepts import (
    background_level,
    count_concepts,
    cumulative_distance,
    effective,
    find_concepts,
    learning_simultaneity,
    stability,
)


@pytest.fixture(autouse=True)
def no_warnings():
    """numpy warns of means of nothing and of divisions by zero; none of them may happen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def golden():
    pinned = {name: value.numpy() for name, value in arrays("concepts").items()}
    pinned["foreground"] = np.stack([pinned["mask"]] * 3)
    return pinned


def close(ours, pinned):
    ours, pinned = np.array(ours, dtype=np.float64), np.array(pinned, dtype=np.float64)
    assert ours.shape == pinned.shape
    assert_close(torch.from_numpy(ours), torch.from_numpy(pinned))


def test_pinned_entropies_are_those_of_their_sigma(golden):
    """The maps that all other pinned numbers start from."""
    close(np.log(golden["sigma"]) + 0.5 * math.log(2 * math.pi) + 0.5, golden["H"])


@pytest.mark.parametrize("background, level, suffix", [("dataset", "Hbar_code", ""), ("image", "Hbar_paper", "_paper")])
def test_pinned_levels_and_counts(golden, background, level, suffix):
    entropy, foreground = golden["H"], golden["foreground"]
    close(background_level(entropy, foreground, background), np.broadcast_to(golden[level], (3, 5)))
    counts = count_concepts(find_concepts(entropy, foreground, golden["threshold"], background), foreground)
    assert (counts.foreground == golden[f"n_fg{suffix}"]).all()
    assert (counts.background == golden[f"n_bg{suffix}"]).all()
    if background == "dataset":
        close(counts.ratio, golden["lambda_ratio"])


def test_pinned_simultaneity_and_stability(golden):
    found = learning_simultaneity(golden["n_fg"], golden["checkpoints"], np.cumsum(golden["weight_diff"]))
    assert (found.peak == golden["checkpoints"][golden["m_hat"]]).all()
    for ours, name in (("distances", "dist"), ("mean", "D_mean"), ("var", "D_var"), ("std", "D_std")):
        close(getattr(found, ours), golden[name])
    close(found.slope, golden["n_fg"].max(1) / golden["dist"])
    concepts = find_concepts(golden["H"], golden["foreground"], 0.2)
    close(stability(concepts, golden["foreground"], "zero"), golden["rho"])
    assert count_concepts(concepts, golden["foreground"]).foreground.dtype == np.int64


def test_pinned_distances_come_from_norms(golden):
    close(cumulative_distance(golden["weight_diff"] * 37.5, 37.5), np.cumsum(golden["weight_diff"]))


def mean_of(values):
    """Without rounding; None of nothing."""
    return sum(map(Fraction, values)) / len(values) if values else None


def cells(size):
    return [(r, c) for r in range(size) for c in range(size)]


def slow_level(entropy, foreground, background):
    images, checkpoints, size, _ = entropy.shape
    own = [
        [mean_of([entropy[n, k, r, c] for r, c in cells(size) if not foreground[n, r, c]]) for k in range(checkpoints)]
        for n in range(images)
    ]
    if background == "image":
        return own
    of_all = [mean_of([own[n][k] for n in range(images) if own[n][k] is not None]) for k in range(checkpoints)]
    return [of_all] * images


def slow_concepts(entropy, foreground, threshold, background):
    """{(image, checkpoint): set of cells}."""
    level = slow_level(entropy, foreground, background)
    images, checkpoints, size, _ = entropy.shape
    return {
        (n, k): {
            (r, c)
            for r, c in cells(size)
            if level[n][k] is not None and level[n][k] - Fraction(entropy[n, k, r, c]) > threshold
        }
        for n in range(images)
        for k in range(checkpoints)
    }


@st.composite
def maps(draw):
    """Entropies with ties and constants, on grids of any content, also all foreground and none."""
    images, checkpoints, size = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    entropy = rng.normal(-2.8, draw(st.sampled_from([0.0, 0.15, 1.0])), (images, checkpoints, size, size))
    share = np.array([draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])) for _ in range(images)])
    foreground = rng.random((images, size, size)) < share[:, None, None]
    return entropy, foreground


@settings(max_examples=150, deadline=None)
@given(maps(), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from(["dataset", "image"]))
def test_concepts_counts_and_stability_against_loops(drawn, threshold, background):
    entropy, foreground = drawn
    images, checkpoints, size, _ = entropy.shape
    expected = slow_concepts(entropy, foreground, threshold, background)
    concepts = find_concepts(entropy, foreground, threshold, background)
    found = {(n, k): set(map(tuple, np.argwhere(concepts[n, k]).tolist())) for n, k in expected}
    assert found == expected
    inside = [{(r, c) for r, c in cells(size) if foreground[n, r, c]} for n in range(images)]
    counts = count_concepts(concepts, foreground)
    for (n, k), chosen in expected.items():
        fg, bg = len(chosen & inside[n]), len(chosen - inside[n])
        assert (counts.foreground[n, k], counts.background[n, k]) == (fg, bg)
        assert counts.ratio[n, k] == (fg / (fg + bg) if fg + bg else 0)
    regions = {"fg": foreground, "bg": ~foreground, "all": np.ones_like(foreground)}
    for part, region in regions.items():
        for empty in ("skip", "zero"):
            rho = stability(concepts, region, empty)
            for n in range(images):
                within = {"fg": inside[n], "bg": set(cells(size)) - inside[n], "all": set(cells(size))}[part]
                ever = set().union(*(expected[n, k] & within for k in range(checkpoints)))
                if ever:
                    assert rho[n] == len(expected[n, checkpoints - 1] & within) / len(ever)
                else:
                    assert math.isnan(rho[n]) if empty == "skip" else rho[n] == 0


@settings(max_examples=150, deadline=None)
@given(
    maps(), st.data(), st.sampled_from([0.0, 0.25, 110 / 150, 1.0]),
)  # fmt: skip
def test_effective_against_loops(drawn, data, share):
    entropy, foreground = drawn
    images, checkpoints, size, _ = entropy.shape
    epochs = sorted(data.draw(st.sets(st.integers(0, 150), min_size=checkpoints, max_size=checkpoints)))
    expected = []
    for n in range(images):
        good = 0 < foreground[n].sum() < size * size
        for k in range(checkpoints):
            if good and epochs[k] >= (1 - Fraction(share).limit_denominator(1000)) * epochs[-1]:
                parts = {
                    inside: [entropy[n, k, r, c] for r, c in cells(size) if foreground[n, r, c] == inside]
                    for inside in (True, False)
                }
                good = mean_of(parts[False]) >= mean_of(parts[True])
        expected.append(good)
    assert effective(entropy, foreground, np.array(epochs), share).tolist() == expected


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_simultaneity_against_loops(images, checkpoints, seed, moved):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, (images, checkpoints))
    epochs = np.sort(rng.choice(12, checkpoints, replace=False))
    per_epoch = np.concatenate([[0.0], rng.random(11) * moved])
    cumulative = cumulative_distance(per_epoch, 2.5)
    found = learning_simultaneity(counts, epochs, cumulative)
    distances = []
    for n in range(images):
        best = 0
        for k in range(checkpoints):
            if counts[n, k] > counts[n, best]:
                best = k
        distances.append(math.fsum(per_epoch[: epochs[best] + 1]) / 2.5)
        assert found.peak[n] == epochs[best]
        assert found.slope[n] == (pytest.approx(counts[n, best] / distances[n]) if distances[n] else 0)
    mean = math.fsum(distances) / images
    var = math.fsum((d - mean) ** 2 for d in distances) / images
    assert found.distances == pytest.approx(distances, rel=1e-12)
    assert (found.mean, found.var) == (pytest.approx(mean, rel=1e-12), pytest.approx(var, rel=1e-9, abs=1e-25))
    assert found.std == pytest.approx(math.sqrt(var), rel=1e-6, abs=1e-12)


def test_the_threshold_is_strict():
    entropy = np.zeros((1, 1, 2, 2))
    entropy[0, 0, 0] = -0.5, -0.75
    foreground = np.array([[[True, True], [False, False]]])
    assert find_concepts(entropy, foreground, 0.5).tolist() == [[[[False, True], [False, False]]]]


def test_images_without_background():
    """They do not move the level of the others; alone they have no concepts."""
    entropy = np.random.default_rng(0).normal(-2.8, 0.5, (3, 2, 4, 4))
    foreground = np.zeros((3, 4, 4), dtype=bool)
    foreground[:, :2] = True
    foreground[0] = True
    level = background_level(entropy, foreground)
    assert (level[0] == level[1]).all() and (level[1:] == background_level(entropy[1:], foreground[1:])).all()
    assert find_concepts(entropy, foreground)[0].any()
    assert not find_concepts(entropy, foreground, background="image")[0].any()
    assert find_concepts(entropy, foreground, background="image")[1:].any()
    for background in ("dataset", "image"):
        assert not find_concepts(entropy[:1], foreground[:1], background=background).any()
    assert effective(entropy * 0, foreground, np.array([1, 2])).tolist() == [False, True, True]
    assert not effective(entropy, ~foreground, np.array([1, 2]))[0]


@pytest.mark.parametrize("value", [-3.186233, -2.8, 0.1])
@pytest.mark.parametrize("background", ["dataset", "image"])
def test_constant_sigma_has_no_concepts_and_is_effective(value, background):
    """Exactly: means of 7, 112 or 144 equal numbers must not be told apart by rounding."""
    entropy = np.full((7, 3, 16, 16), value)
    foreground = np.zeros((7, 16, 16), dtype=bool)
    foreground[:, 2:14, 2:14] = True
    concepts = find_concepts(entropy, foreground, 0.0, background)
    assert not concepts.any()
    counts = count_concepts(concepts, foreground)
    assert not counts.foreground.any() and not counts.ratio.any()
    assert effective(entropy, foreground, np.array([0, 1, 2])).all()
    assert np.isnan(stability(concepts, foreground)).all() and not stability(concepts, foreground, "zero").any()
    found = learning_simultaneity(counts.foreground, np.array([1, 5, 9]), np.arange(10) * value**2)
    assert (found.peak == 1).all() and found.var == found.std == 0


def test_a_background_of_equal_cells_has_exactly_their_level():
    """Whatever lies in the foreground."""
    entropy = np.random.default_rng(0).normal(-2.8, 5, (1, 50, 3, 3))
    entropy[..., 1:] = entropy[..., 1:2, 1:2]
    foreground = np.zeros((1, 3, 3), dtype=bool)
    foreground[:, :, 0] = True
    assert (background_level(entropy, foreground, "image") == entropy[..., 1, 1]).all()
    assert not find_concepts(entropy, foreground, 0.0)[..., 1:].any()


def test_no_images_at_all():
    entropy, foreground = np.zeros((0, 2, 4, 4)), np.zeros((0, 4, 4), dtype=bool)
    for background in ("dataset", "image"):
        assert find_concepts(entropy, foreground, background=background).shape == (0, 2, 4, 4)
    counts = count_concepts(find_concepts(entropy, foreground), foreground)
    assert counts.ratio.shape == (0, 2) and stability(np.zeros((0, 2, 4, 4), bool), foreground).shape == (0,)
    assert effective(entropy, foreground, np.array([0, 1])).shape == (0,)
    found = learning_simultaneity(counts.foreground, np.array([0, 1]), np.zeros(2))
    assert found.distances.shape == (0,) and all(map(math.isnan, (found.mean, found.var, found.std)))


def test_effective_of_the_paper_starts_at_epoch_40_of_150():
    """The reference's checkpoints: an image that fails at 40 is out, one that fails at 30 stays."""
    epochs = np.array([0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 110, 130, 150])
    entropy = np.zeros((2, len(epochs), 2, 2))
    foreground = np.zeros((2, 2, 2), dtype=bool)
    foreground[:, 0] = True
    entropy[0, epochs == 30, 0] = entropy[1, epochs == 40, 0] = 1
    assert effective(entropy, foreground, epochs).tolist() == [True, False]
    for scale in range(1, 8):  # the same runs, longer and shorter by whole factors
        assert effective(entropy, foreground, epochs * scale).tolist() == [True, False]
    halves = np.array([epoch // 5 for epoch in epochs[8:]])
    assert effective(entropy[:, 8:], foreground, halves).tolist() == [True, False]


def test_effective_always_looks_at_the_last_checkpoint():
    entropy = np.zeros((1, 2, 1, 2))
    foreground = np.array([[[True, False]]])
    entropy[0, 1, 0, 0] = 1
    assert not effective(entropy, foreground, np.array([0, 9]), share=0.0).any()
    assert effective(entropy[:, :1], foreground, np.array([0])).all()


def test_float32_entropies_are_averaged_in_float64():
    entropy = np.random.default_rng(0).normal(-2.8, 0.1, (2, 1, 16, 16)).astype(np.float32)
    foreground = np.zeros((2, 16, 16), dtype=bool)
    level = background_level(entropy, foreground, "image")
    assert level.dtype == np.float64
    assert level[1, 0] == pytest.approx(float(mean_of(entropy[1, 0].astype(float).ravel().tolist())), rel=1e-14)


GOOD = np.zeros((2, 3, 4, 4)), np.zeros((2, 4, 4), dtype=bool)


@pytest.mark.parametrize(
    "entropy, foreground, message",
    [
        (GOOD[0][0], GOOD[1], "shape"),
        (GOOD[0][:, :0], GOOD[1], "shape"),
        (GOOD[0], GOOD[1][:1], "does not fit"),
        (GOOD[0], GOOD[1][:, :3], "does not fit"),
        (GOOD[0], GOOD[1].astype(np.uint8), "bool"),
        (GOOD[0] + np.nan, GOOD[1], "not finite"),
        (GOOD[0] - np.inf, GOOD[1], "not finite"),
    ],
)
def test_maps_that_do_not_fit(entropy, foreground, message):
    for ask in (find_concepts, background_level, lambda e, f: effective(e, f, np.arange(3))):
        with pytest.raises(UserError, match=message):
            ask(entropy, foreground)


def test_wrong_options():
    concepts = np.zeros(GOOD[0].shape, dtype=bool)
    with pytest.raises(UserError, match="unknown background 'images'; did you mean 'image'"):
        find_concepts(*GOOD, background="images")
    with pytest.raises(UserError, match="unknown empty"):
        stability(concepts, GOOD[1], empty="nan")
    for threshold in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match="threshold"):
            find_concepts(*GOOD, threshold=threshold)
    for ask in (count_concepts, stability):
        with pytest.raises(UserError, match="bool"):
            ask(*GOOD)
        with pytest.raises(UserError, match="does not fit"):
            ask(concepts, GOOD[1][:, :2])
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match="share"):
            effective(*GOOD, np.arange(3), share)
    with pytest.raises(UserError, match="3 checkpoints and there are 2 epochs"):
        effective(*GOOD, np.arange(2))


@pytest.mark.parametrize("start", [0, -1.0, math.nan, math.inf])
def test_a_distance_needs_a_norm_at_the_start(start):
    with pytest.raises(UserError, match="norm at the start"):
        cumulative_distance(np.zeros(3), start)


@pytest.mark.parametrize("record", [[0, -1.0], [0, math.nan], [0, math.inf], [1.0, 1.0], [], [[0.0]]])
def test_records_that_are_none(record):
    with pytest.raises(UserError):
        cumulative_distance(np.array(record), 1.0)


@pytest.mark.parametrize("epochs", [[0, 2, 2], [0, 3, 1], [-1, 0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]], []])
def test_epochs_that_do_not_increase(epochs):
    with pytest.raises(UserError, match="increase"):
        learning_simultaneity(np.zeros((2, 3), dtype=int), np.array(epochs), np.zeros(9))
    with pytest.raises(UserError, match="increase"):
        effective(*GOOD, np.array(epochs))


def test_checkpoints_beyond_the_record():
    counts = np.zeros((2, 3), dtype=int)
    assert learning_simultaneity(counts, np.array([0, 1, 4]), np.zeros(5)).mean == 0
    with pytest.raises(UserError, match="epoch 5 lies beyond the record of weights, which ends at epoch 4"):
        learning_simultaneity(counts, np.array([0, 1, 5]), np.zeros(5))
    with pytest.raises(UserError, match="do not fit 2 checkpoints"):
        learning_simultaneity(counts, np.array([0, 1]), np.zeros(5))
