"""Batch samplers: who is in a batch, how often, and that nothing but (seed, epoch) decides it."""

from collections import Counter

import numpy as np
import pytest

from metric_kd.data.batches import ClassBalancedBatches, ShuffledBatches, distinct
from metric_kd.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12), [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 50]))


def test_distinct_numbers_are_distinct_in_range_and_as_many_as_there_are():
    population = np.array([1, 2, 3, 5, 40, 5])
    for trial in range(50):
        chosen = distinct(np.random.default_rng(trial), population, 5)
        for row, n in zip(chosen, population, strict=True):
            real = row[row >= 0]
            assert len(real) == min(n, 5) == len(set(real)) and real.max() < n
            assert (row[: len(real)] >= 0).all()


def test_distinct_is_uniform_in_every_column():
    chosen = distinct(np.random.default_rng(0), np.full(40_000, 7), 4)
    for column in chosen.T:
        assert abs(np.bincount(column, minlength=7) / 40_000 - 1 / 7).max() < 0.01
    pairs = Counter(map(tuple, chosen[:, :2]))
    assert len(pairs) == 42 and max(pairs.values()) < 1.25 * min(pairs.values())


@pytest.mark.parametrize("per_class", [2, 5])
def test_a_batch_holds_up_to_per_class_images_of_each_class_until_it_is_full(per_class):
    batches = ClassBalancedBatches(LABELS, 23, per_class, 200, seed=0)
    assert len(batches) == 200
    sizes = np.bincount(LABELS)
    for batch in batches.epoch(0):
        assert batch.dtype == np.int64 and len(batch) == len(set(batch)) == 23
        labels = LABELS[batch]
        changes = np.flatnonzero(np.diff(labels)) + 1
        runs = np.split(labels, changes)
        assert len({run[0] for run in runs}) == len(runs), "the images of a class stand together"
        for run in runs[:-1]:
            assert len(run) == min(per_class, sizes[run[0]])


def test_classes_are_equally_likely_and_images_within_a_class_too():
    labels = np.repeat([0, 1, 2, 3], [4, 8, 12, 40])
    batches = ClassBalancedBatches(labels, 8, 4, 6000, seed=1).epoch(0)
    drawn = np.bincount(np.concatenate(batches), minlength=len(labels))
    per_class = np.bincount(labels, weights=drawn)
    assert abs(per_class / per_class.mean() - 1).max() < 0.05
    assert abs(drawn[24:] / drawn[24:].mean() - 1).max() < 0.15
    cut = ClassBalancedBatches(labels, 5, 4, 6000, seed=1).epoch(0)  # the last class is cut to one image
    last = np.bincount([b[-1] for b in cut], minlength=len(labels))
    assert abs(last[:4] / last[:4].mean() - 1).max() < 0.15


def test_many_and_few_classes_take_both_ways_of_drawing_them():
    for classes in (4, 3000):
        labels = np.repeat(np.arange(classes), 3)
        firsts = [labels[b[::3]] for b in ClassBalancedBatches(labels, 12, 3, 3000, 0).epoch(0)]
        counts = Counter(np.concatenate(firsts))
        assert len(counts) > 0.95 * classes
        for batch in ClassBalancedBatches(labels, 12, 3, 50, 0).epoch(1):
            assert sorted(Counter(labels[batch]).values()) == [3, 3, 3, 3]


def test_seed_and_epoch_decide_and_nothing_else():
    def epoch(seed, number):
        return np.stack(ClassBalancedBatches(LABELS, 20, 5, 10, seed).epoch(number))

    np.random.seed(0)
    first = epoch(0, 3)
    np.random.seed(1)
    np.testing.assert_array_equal(epoch(0, 3), first)
    assert (epoch(0, 4) != first).any() and (epoch(1, 3) != first).any()


def test_ranks_share_one_global_batch_evenly():
    whole = ClassBalancedBatches(LABELS, 24, 4, 10, 0).epoch(2)
    parts = [ClassBalancedBatches(LABELS, 24, 4, 10, 0, rank, 3).epoch(2) for rank in range(3)]
    for k, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), batch)
        assert {len(part[k]) for part in parts} == {8}


def test_a_small_data_set_gives_small_batches():
    labels = np.repeat([0, 1, 2], 4)
    assert {len(b) for b in ClassBalancedBatches(labels, 64, 5, 10, 0).epoch(0)} == {12}
    assert {len(b) for b in ClassBalancedBatches(labels, 64, 3, 10, 0).epoch(0)} == {9}
    assert {len(b) for b in ClassBalancedBatches(labels, 64, 3, 10, 0, 1, 2).epoch(0)} == {4}


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.repeat([0, 1], 9), {"batch": 5}, "smaller than two classes"),
        (np.repeat([0, 1], 9), {"batch": 6, "world": 4}, "multiple of 4"),
        (np.repeat([0, 1], 9), {"batch": 0}, "positive"),
        (np.repeat([0, 1], 9), {"per_class": 1}, "no positive pair"),
        (np.repeat([0, 1], 9), {"iterations": 0}, "train nothing"),
        (np.zeros(9, dtype=int), {}, "two classes"),
        (np.array([0, 0, 1, 2, 2]), {"class_names": ("a", "b", "c")}, "class 'b' has one image"),
    ],
)
def test_what_cannot_be_sampled_is_refused(labels, options, message):
    with pytest.raises(UserError, match=message):
        ClassBalancedBatches(**{"labels": labels, "batch": 10, "per_class": 5, "iterations": 3, "seed": 0, **options})


def test_single_images_are_fine_where_no_pair_is_needed():
    batches = ClassBalancedBatches(np.arange(9), 4, 1, 5, 0, pairs=False)
    assert all(len(set(b)) == 4 for b in batches.epoch(0))


def test_small_classes_do_not_hide_behind_a_large_per_class():
    """A batch of 4 holds two classes where no class has more than 3 images, whatever per_class says."""
    for batch in ClassBalancedBatches(np.repeat([0, 1, 2], 3), 4, 5, 20, 0).epoch(0):
        assert len(set(np.repeat([0, 1, 2], 3)[batch])) == 2


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 4, 1), (12, 4, 1), (21, 8, 2), (3, 8, 1), (17, 8, 4)])
def test_shuffled_batches_use_every_image_once(count, batch, world):
    ranks = [ShuffledBatches(count, batch, 0, rank, world) for rank in range(world)]
    epochs = [r.epoch(5) for r in ranks]
    assert {len(e) for e in epochs} == {len(ranks[0])} == {ranks[0].iterations}
    used = np.concatenate([b for e in epochs for b in e])
    assert len(used) == len(set(used)) == count // world * world
    for parts in zip(*epochs, strict=True):
        assert len({len(p) for p in parts}) == 1 and len(parts[0]) > 0


def test_shuffled_batches_can_drop_the_short_one_and_change_every_epoch():
    batches = ShuffledBatches(10, 4, 0, drop_last=True)
    assert [len(b) for b in batches.epoch(0)] == [4, 4]
    assert (np.concatenate(batches.epoch(0)) != np.concatenate(batches.epoch(1))).any()
    np.testing.assert_array_equal(batches.epoch(1), ShuffledBatches(10, 4, 0, drop_last=True).epoch(1))
    with pytest.raises(UserError, match="give more images"):
        ShuffledBatches(1, 2, 0, 0, 2)


def test_it_says_how_many_images_a_batch_holds():
    labels = np.arange(30) % 3  # ten of each class, of which four at most
    for batch, world, held in ((9, 1, 9), (16, 1, 12), (20, 5, 10), (16, 8, 8)):
        batches = ClassBalancedBatches(labels, batch, 4, 3, seed=0, world=world)
        assert batches.held == held == world * len(batches.epoch(1)[0])
