"""Images that a data set holds twice: within training, and in training and test."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metric_kd.data.records import ImageRecords

BUDGET = 1 << 29
"""Bytes that are read at most."""
STRIDE = 4
"""Pixels in memory are first compared on every fourth row and column."""


class Repeats(NamedTuple):
    """Rows of images that are equal byte for byte (files) or pixel for pixel (in memory).

    within: (row, earlier row) of the training images; leaked: (row of the test images, row of the training images); whole:
    whether all that might be equal were compared.
    """

    within: list[tuple[int, int]]
    leaked: list[tuple[int, int]]
    whole: bool


def find_repeats(train: ImageRecords, test: ImageRecords, budget: int = BUDGET) -> Repeats:
    """What repeats an earlier training image, of training and of test; files that are not there are left out.

    Only files of one size, and pixels that agree on a coarse grid, are read and compared, up to ``budget`` bytes.
    """
    sides = (train, test)
    alike: dict[object, list[tuple[int, int]]] = defaultdict(list)
    for side, records in enumerate(sides):
        for row, key in enumerate(_coarse(records)):
            if key is not None:
                alike[key].append((side, row))
    within: list[tuple[int, int]] = []
    leaked: list[tuple[int, int]] = []
    for places in alike.values():
        if len(places) < 2 or all(side == 1 for side, _ in places):
            continue
        first: dict[bytes, int] = {}
        for side, row in places:  # training comes first
            content = _content(sides[side], row)
            if content is None:
                continue
            budget -= len(content)
            if budget < 0:
                return Repeats(sorted(within), sorted(leaked), False)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if digest in first:
                (leaked if side else within).append((row, first[digest]))
            elif side == 0:
                first[digest] = row
    return Repeats(sorted(within), sorted(leaked), True)


def _coarse(records: ImageRecords) -> Iterable[object]:
    """Of every image what equal ones share; None where it cannot be read."""
    if records.pixels is not None:
        for image in records.pixels:
            yield hashlib.blake2b(image[::STRIDE, ::STRIDE].tobytes(), digest_size=16).digest()
        return
    for path in records.paths or ():
        try:
            yield os.stat(path).st_size
        except OSError:
            yield None


def _content(records: ImageRecords, row: int) -> bytes | None:
    if records.pixels is not None:
        return bytes(np.ascontiguousarray(records.pixels[row]).data)
    assert records.paths is not None
    try:
        return Path(records.paths[row]).read_bytes()
    except OSError:
        return None


def name_of(records: ImageRecords, row: int) -> str:
    """An image for people: its path, or its place."""
    return f"image {row}" if records.paths is None else records.paths[row]
