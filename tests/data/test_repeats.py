"""Images that repeat another one, against comparing every pair."""

import numpy as np
import pytest

from metric_kd.data.records import ImageRecords
from metric_kd.data.repeats import find_repeats, name_of


def pixels(count, seed, size=9):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def records(images, folder=None):
    labels, names = np.arange(len(images)) % 2, ("a", "b")
    if folder is None:
        return ImageRecords("drawn", labels, names, pixels=images)
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.bin" for k in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image.tobytes())
    return ImageRecords("written", labels, names, paths=tuple(map(str, paths)))


@pytest.mark.parametrize("files", [False, True])
def test_every_pair(files, tmp_path):
    train, test = pixels(12, 0), pixels(9, 1)
    train[5], train[9], train[11] = train[2], train[2], train[7]
    test[3], test[6], test[8] = train[9], test[1], train[0]
    train[4] = train[1]
    train[4, 1, 1] += 1  # equal on the coarse grid, and as files of one size, but not equal
    ours, theirs = (records(x, tmp_path / name if files else None) for x, name in ((train, "train"), (test, "test")))
    found = find_repeats(ours, theirs)
    first = {k: min(j for j in range(k + 1) if (train[j] == train[k]).all()) for k in range(12)}
    assert found.within == [(k, j) for k, j in first.items() if j < k] == [(5, 2), (9, 2), (11, 7)]
    expected = [(k, j) for k in range(9) for j in range(12) if (test[k] == train[j]).all() and first[j] == j]
    assert found.leaked == expected == [(3, 2), (8, 0)]
    assert found.whole
    assert name_of(ours, 5) == (str(tmp_path / "train" / "5.bin") if files else "image 5")


def test_the_budget_and_files_that_are_gone(tmp_path):
    same = np.repeat(pixels(1, 0), 6, axis=0)
    ours, theirs = records(same, tmp_path / "a"), records(same[:2], tmp_path / "b")
    assert len(find_repeats(ours, theirs).within) == 5
    cut = find_repeats(ours, theirs, budget=3 * same[0].nbytes)
    assert not cut.whole and cut.within == [(1, 0), (2, 0)] and cut.leaked == []
    (tmp_path / "a" / "0.bin").unlink()
    assert find_repeats(ours, theirs).within[0] == (2, 1)
