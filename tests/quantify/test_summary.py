"""The table of metrics against loops over images, its standard errors, and what it says where little is known."""

import math
import statistics
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pinned import arrays

from metric_kd.errors import UserError
from metric_kd.quantify.concepts import count_concepts, find_concepts, stability
from metric_kd.quantify.summary import Quantified, curve, metric_table, unlearned

KEYS = ["n_fg", "n_bg", "ratio", "n_fg_peak", "d_mean", "d_var", "d_std", "rho"]
MORE = [True, None, True, None, False, None, False, True]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def network(name, seed, images=6, checkpoints=4, size=5, distance=True, spread=0.5):
    rng = np.random.default_rng(seed)
    epochs = np.arange(checkpoints) * 2
    moved = np.cumsum(np.concatenate([[0], rng.random(epochs[-1])])) if distance else None
    return Quantified(name, epochs, rng.normal(-2.8, spread, (images, checkpoints, size, size)), moved)


def foregrounds(images=6, size=5, seed=9):
    return np.random.default_rng(seed).random((images, size, size)) < 0.5


def by_key(table):
    return {row.key: row for row in table.rows}


def test_the_pinned_case_in_a_table():
    pinned = {name: value.numpy() for name, value in arrays("concepts").items()}
    one = Quantified("distilled", pinned["checkpoints"], pinned["H"], np.cumsum(pinned["weight_diff"]))
    found = by_key(metric_table("all", [one], np.stack([pinned["mask"]] * 3), np.arange(3), empty="zero"))
    expected = {
        "n_fg": pinned["n_fg"][:, -1].mean(),
        "n_bg": pinned["n_bg"][:, -1].mean(),
        "ratio": pinned["lambda_ratio"][:, -1].mean(),
        "n_fg_peak": pinned["n_fg"].max(1).mean(),
        "d_mean": pinned["D_mean"],
        "d_var": pinned["D_var"],
        "d_std": pinned["D_std"],
        "rho": pinned["rho"].mean(),
    }
    means = {key: row.values["distilled"].mean for key, row in found.items()}
    assert means == pytest.approx({key: float(value) for key, value in expected.items()}, rel=1e-9)
    line = curve(one, np.stack([pinned["mask"]] * 3), np.arange(3))
    assert line.network == "distilled" and (line.epochs == pinned["checkpoints"]).all()
    for ours, name in ((line.foreground, "n_fg"), (line.background, "n_bg"), (line.ratio, "lambda_ratio")):
        assert ours == pytest.approx(pinned[name].mean(0), rel=1e-12)


def slow_numbers(net, foreground, rows, threshold, background, empty):
    """source -> one number per chosen image; concepts come from the function that has loops of its own in its tests."""
    concepts = find_concepts(net.entropy[rows], foreground[rows], threshold, background)
    counts = count_concepts(concepts, foreground[rows])
    out = {"n_fg": [], "n_bg": [], "ratio": [], "n_fg_peak": [], "distance": [], "rho": []}
    rho = stability(concepts, foreground[rows], empty)
    for m in range(len(rows)):
        series = counts.foreground[m].tolist()
        out["n_fg"].append(series[-1])
        out["n_bg"].append(int(counts.background[m, -1]))
        out["ratio"].append(float(counts.ratio[m, -1]))
        out["n_fg_peak"].append(max(series))
        moved = float(net.distance[net.epochs[series.index(max(series))]])
        out["distance"].append(math.nan if empty == "skip" and max(series) == 0 else moved)
        out["rho"].append(float(rho[m]))
    return out


SOURCES = {key: key for key in KEYS} | {"d_mean": "distance", "d_var": "distance", "d_std": "distance"}
STATISTICS = dict.fromkeys(KEYS, statistics.fmean) | {"d_var": statistics.pvariance, "d_std": statistics.pstdev}


def slow_error(key, values):
    """values: one number, or a pair of networks' numbers, of every image."""
    count = len(values)

    def of(chosen):
        columns = list(zip(*chosen, strict=True))
        results = [STATISTICS[key](column) for column in columns]
        return results[0] - results[1] if len(results) == 2 else results[0]

    if count < (3 if key in ("d_var", "d_std") else 2):
        return None
    if key not in ("d_var", "d_std"):
        return statistics.stdev([v[0] - v[1] if len(v) == 2 else v[0] for v in values]) / math.sqrt(count)
    without = [of(values[:k] + values[k + 1 :]) for k in range(count)]
    middle = statistics.fmean(without)
    error = math.sqrt((count - 1) / count * math.fsum((theta - middle) ** 2 for theta in without))
    largest = max(STATISTICS[key](column) for column in zip(*values, strict=True))
    return None if largest > 0 and error <= 1e-9 * largest else error


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.2, 0.9]),
    st.sampled_from(["dataset", "image"]), st.sampled_from(["skip", "zero"]),
)  # fmt: skip
def test_tables_against_loops(seed, chosen, threshold, background, empty):
    foreground = foregrounds(seed=seed)
    nets = [network(name, seed + k, spread=0.4) for k, name in enumerate(("distilled", "baseline", "teacher"))]
    rows = np.random.default_rng(seed).permutation(6)[:chosen]
    table = metric_table("some", nets, foreground, rows, threshold=threshold, background=background, empty=empty)
    assert (table.title, table.images) == ("some", chosen)
    assert [row.key for row in table.rows] == KEYS and [row.more for row in table.rows] == MORE
    numbers = {net.name: slow_numbers(net, foreground, rows, threshold, background, empty) for net in nets}
    for row in table.rows:
        means = {}
        for net in nets:
            values = [v for v in numbers[net.name][SOURCES[row.key]] if not math.isnan(v)]
            if not values:
                assert row.values[net.name] is None
                continue
            means[net.name] = STATISTICS[row.key](values)
            mean, error = row.values[net.name]
            assert mean == pytest.approx(means[net.name], rel=1e-9, abs=1e-12)
            expected = slow_error(row.key, [(v,) for v in values])
            assert error is None if expected is None else error == pytest.approx(expected, rel=1e-6, abs=1e-12)
        pairs = [numbers[name][SOURCES[row.key]] for name in ("distilled", "baseline")]
        both = [pair for pair in zip(*pairs, strict=True) if not any(map(math.isnan, pair))]
        if row.more is None or not {"distilled", "baseline"} <= means.keys():
            assert row.held is None
        elif abs(means["distilled"] - means["baseline"]) > 1e-12:
            assert row.held == ((means["distilled"] > means["baseline"]) == row.more)
        error = slow_error(row.key, both)
        if error is None:
            assert row.clear is None
        else:
            difference = [STATISTICS[row.key](column) for column in zip(*both, strict=True)]
            size = abs(difference[0] - difference[1])
            if abs(size - error) > 1e-9:
                assert row.clear == (size > error)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """The two kinds of standard errors agree where both apply."""
    values = np.random.default_rng(0).random(7)
    without = np.array([np.delete(values, k).mean() for k in range(7)])
    assert np.sqrt(6 * without.var()) == pytest.approx(values.std(ddof=1) / np.sqrt(7))


def test_the_level_is_that_of_the_chosen_images():
    foreground = foregrounds()
    one = network("distilled", 0)
    rows = np.array([4, 1])
    alone = Quantified("distilled", one.epochs, one.entropy[rows], one.distance)
    some = metric_table("x", [one], foreground, rows)
    assert some == metric_table("x", [alone], foreground[rows], np.arange(2))
    one.entropy[0] += 50  # an image that was not chosen
    assert metric_table("x", [one], foreground, rows) == some
    chosen = np.isin(np.arange(6), rows)
    assert by_key(metric_table("x", [one], foreground, chosen))["n_fg"] == by_key(some)["n_fg"]
    line, same = curve(one, foreground, rows), curve(alone, foreground[rows], np.arange(2))
    assert (line.foreground == same.foreground).all() and (line.ratio == same.ratio).all()


def test_images_that_were_not_chosen_may_be_unknown():
    one = network("distilled", 0)
    one.entropy[2] = np.nan
    assert metric_table("x", [one], foregrounds(), np.array([0, 1])).images == 2
    with pytest.raises(UserError, match="not finite"):
        metric_table("x", [one], foregrounds(), np.array([0, 2]))


def test_rows_that_no_network_can_have_are_left_out():
    foreground = foregrounds()
    single = network("teacher", 0, checkpoints=1, distance=False)
    silent = network("distilled", 1, distance=False)
    full = network("baseline", 2)
    rows = np.arange(6)
    assert [row.key for row in metric_table("x", [single], foreground, rows).rows] == ["n_fg", "n_bg", "ratio"]
    found = metric_table("x", [single, silent], foreground, rows)
    assert [row.key for row in found.rows] == ["n_fg", "n_bg", "ratio", "n_fg_peak", "rho"]
    found = by_key(metric_table("x", [single, silent, full], foreground, rows))
    assert list(found) == KEYS
    assert found["d_mean"].values["distilled"] is None and found["d_mean"].values["baseline"] is not None
    assert found["d_mean"].held is None and found["d_mean"].clear is None
    assert found["rho"].values["teacher"] is None and found["rho"].held is not None
    assert curve(single, foreground, rows).ratio.shape == (1,)


def test_no_chosen_images():
    foreground = foregrounds()
    nets = [network("distilled", 0), network("baseline", 1)]
    for rows in (np.array([], dtype=np.int64), np.array([]), np.zeros(6, dtype=bool)):
        table = metric_table("none", nets, foreground, rows)
        assert table.images == 0 and [row.key for row in table.rows] == KEYS
        for row in table.rows:
            assert row.values == {"distilled": None, "baseline": None}
            assert row.held is None and row.clear is None
        line = curve(nets[0], foreground, rows)
        assert np.isnan(line.foreground).all() and line.background.shape == line.ratio.shape == (4,)


def peaks(name, at, images=4, last=1.0):
    """A network whose image n has one concept at checkpoint ``at[n]``, and one foreground cell in two."""
    entropy = np.full((images, 3, 1, 2), -2.8)
    for n, k in enumerate(at):
        if k is not None:
            entropy[n, k, 0, 0] -= last
    return Quantified(name, np.array([0, 1, 2]), entropy, np.array([0.0, 0.1, 0.3]))


HALF = np.array([[[True, False]]] * 4)


def test_equal_distances_have_no_deviation_whatever_rounding_says():
    """Three times 0.3 has not the mean 0.3 in floats; a deviation of 1e-17 must not be held or clear."""
    nets = [peaks("distilled", [2, 2, 2, 2]), peaks("baseline", [1, 1, 1, 1])]
    for images in (3, 4):
        found = by_key(metric_table("x", nets, HALF, np.arange(images)))
        for key in ("d_var", "d_std"):
            assert found[key].values == {"distilled": (0, 0), "baseline": (0, 0)}
            assert found[key].held is (None if key == "d_var" else False) and found[key].clear is False
        assert found["d_mean"].held is False and found["d_mean"].clear is True  # 0.3 and 0.1, without any spread


def test_images_without_concepts_leave_rho_alone():
    """Image 0 has a stability only in the baseline, image 1 only in the distilled network."""
    nets = [peaks("distilled", [None, 2, 2, 0]), peaks("baseline", [2, None, 0, 0])]
    row = by_key(metric_table("x", nets, HALF, np.arange(4)))["rho"]
    assert row.values["distilled"].mean == pytest.approx(2 / 3) and row.values["baseline"].mean == pytest.approx(1 / 3)
    assert row.values["distilled"].error == pytest.approx(statistics.stdev([1, 1, 0]) / math.sqrt(3))
    assert row.held is True and row.clear is False  # differences of the images both have: 1 and 0, mean 0.5, error 0.5
    zero = by_key(metric_table("x", nets, HALF, np.arange(4), empty="zero"))["rho"]
    assert zero.values["distilled"].mean == 0.5 and zero.values["baseline"].mean == 0.25
    alone = by_key(metric_table("x", nets, HALF, np.array([0])))["rho"]
    assert alone.values == {"distilled": None, "baseline": (1.0, None)} and alone.held is None and alone.clear is None


def test_one_and_two_images_have_few_errors():
    nets = [network("distilled", 0), network("baseline", 1)]
    one = by_key(metric_table("x", nets, foregrounds(), np.array([3])))
    assert all(value.error is None for row in one.values() for value in row.values.values() if value)
    assert all(row.clear is None for row in one.values())
    two = by_key(metric_table("x", nets, foregrounds(), np.array([3, 0])))
    assert two["n_fg"].values["distilled"].error is not None and two["n_fg"].clear is not None
    assert two["d_std"].values["distilled"].error is None and two["d_std"].clear is None


def test_a_clear_difference_and_an_equal_one():
    nets = [peaks("distilled", [2, 2, 2, 2]), peaks("baseline", [0, 0, 0, 2])]
    found = by_key(metric_table("x", nets, HALF, np.arange(4)))
    assert found["n_fg"].held is True and found["n_fg"].clear is True  # 1 against 1/4: 0.75, error 0.25
    assert found["n_fg"].values["baseline"] == (0.25, pytest.approx(0.25))
    assert found["n_bg"].held is None and found["n_bg"].clear is False
    assert found["n_fg_peak"].held is None and found["n_fg_peak"].clear is False  # equal


def test_what_does_not_fit_is_refused():
    foreground, one = foregrounds(), network("distilled", 0)
    for rows in (np.array([6]), np.array([-1]), np.array([1, 1]), np.array([0.5]), np.array([[0]]), np.ones(5, bool)):
        with pytest.raises(UserError, match="chosen images|choice"):
            metric_table("x", [one], foreground, rows)
    with pytest.raises(UserError, match="name of its own"):
        metric_table("x", [one, one], foreground, np.arange(6))
    with pytest.raises(UserError, match="distilled has entropies"):
        metric_table("x", [one], foreground[:5], np.arange(5))
    short = Quantified("distilled", one.epochs[1:], one.entropy, one.distance)
    with pytest.raises(UserError, match="3 checkpoints"):
        curve(short, foreground, np.arange(6))
    beyond = Quantified("distilled", one.epochs, one.entropy, one.distance[:-1])
    with pytest.raises(UserError, match="beyond the record"):
        metric_table("x", [beyond], foreground, np.arange(6))
    with pytest.raises(UserError, match="unknown empty"):
        metric_table("x", [one], foreground, np.arange(6), empty="none")


def test_two_values_that_are_equally_frequent_have_no_standard_error_of_their_deviation():
    """Leaving out any image changes it alike: the jackknife finds 0, which is no certainty."""
    nets = [peaks("distilled", [2, 2, 1, 1]), peaks("baseline", [1, 2, 2, 2])]
    found = by_key(metric_table("x", nets, HALF, np.arange(4)))
    assert found["d_std"].values["distilled"].mean > 0 and found["d_std"].values["distilled"].error is None
    assert found["d_std"].values["baseline"].error > 0
    assert found["d_mean"].values["distilled"].error > 0


def test_what_was_never_learned_and_what_was_there_from_the_start():
    net = peaks("distilled", [0, 2, 1, 0])
    assert unlearned(net, HALF) == (0, 2)
    flat = replace(net, entropy=np.full_like(net.entropy, -3.0))
    assert unlearned(flat, HALF) == (4, 0)
    rows = by_key(metric_table("x", [flat], HALF, np.arange(4)))
    assert rows["d_mean"].values["distilled"] is None and rows["rho"].values["distilled"] is None
    rows = by_key(metric_table("x", [flat], HALF, np.arange(4), empty="zero"))
    assert rows["d_mean"].values["distilled"].mean == 0.0
