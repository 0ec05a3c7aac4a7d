"""Retrieval galleries: queries and what each network finds for them, right and wrong marked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metric_kd.data.records import ImageRecords
from metric_kd.errors import UserError
from metric_kd.report.pictures import THUMBNAIL, Picture, photograph
from metric_kd.types import Neighbours

ImageOf = Callable[[int], np.ndarray]
"""row -> (H, W, 3) uint8."""

COMPARED = (
    ("fixed", "Wrong without a teacher, right after distillation", "What distillation repaired."),
    ("broken", "Right without a teacher, wrong after distillation", "The price: what distillation spoilt."),
    ("both_right", "Right with both", "The student needs no teacher for these."),
    ("both_wrong", "Wrong with both", "What is still out of the student's reach."),
)
SINGLE = (
    ("wrong", "The nearest neighbour is wrong", "What the network confuses."),
    ("right", "The nearest neighbour is right", "What it finds."),
)
"""(key, heading, explanation) of the groups of queries, in the order of the page."""


@dataclass(frozen=True)
class Tile:
    """One neighbour."""

    picture: Picture
    name: str
    right: bool


@dataclass(frozen=True)
class QueryRow:
    """A query and, per network, its neighbours, nearest first."""

    picture: Picture
    name: str
    found: tuple[tuple[str, tuple[Tile, ...]], ...]


@dataclass(frozen=True)
class Group:
    """Queries of one kind: ``count`` of all queries are of it, ``rows`` are shown."""

    key: str
    heading: str
    explanation: str
    count: int
    rows: tuple[QueryRow, ...]


@dataclass(frozen=True)
class Gallery:
    """compared: the names (before, after) of the two networks that sort the queries, or None for a single network; split:
    whether a gallery of its own is searched, not all other test images.
    """

    title: str
    queries: int
    k: int
    groups: tuple[Group, ...]
    compared: tuple[str, str] | None
    split: bool = False

    def count(self, key: str) -> int:
        return next(group.count for group in self.groups if group.key == key)


def pixels_of(records: ImageRecords, rows: np.ndarray | None = None) -> ImageOf:
    """row -> image of the data set; ``rows``: which of them, in order, where only a part is queried or offered."""

    def image(row: int) -> np.ndarray:
        row = int(row if rows is None else rows[row])
        if records.pixels is not None:
            return records.pixels[row]
        from metric_kd.data.decode import decode

        assert records.paths is not None
        return decode(records.paths[row]).permute(1, 2, 0).numpy()

    return image


def retrieval_gallery(
    networks: Mapping[str, Neighbours],
    images: ImageOf,
    class_names: Sequence[str],
    *,
    compare: tuple[str, str] | None = None,
    groups: Sequence[tuple[str, str, str]] | None = None,
    k: int = 5,
    per_group: int = 3,
    seed: int = 0,
    gallery_images: ImageOf | None = None,
    title: str = "What the networks find",
    side: int = THUMBNAIL,
) -> Gallery:
    """Queries with the k nearest neighbours that every network finds for them, sorted by whether the first is right.

    networks: name -> neighbours of the same queries in the same gallery. compare: the names of the student without a
    teacher and the distilled one, whose first neighbours make the groups; None groups by the first network alone.
    groups: headings for other networks than those, as ``COMPARED`` has them: fixed is wrong with the first of ``compare``
    and right with the second, broken the reverse. side: px of the longer side of a large image's thumbnail.
    gallery_images: where the queries are searched in images of their own.
    ``per_group`` queries are drawn at random from each group (``seed``), of different classes while there are any.
    Raises ``UserError`` where the networks do not fit each other or fewer than k neighbours were searched.
    """
    _check(networks, compare, k)
    first = next(iter(networks.values()))
    labels = first.query_labels.numpy()
    draw = np.random.default_rng(seed)
    if compare is None:
        right = _hits(first)
        members = {"right": right, "wrong": ~right}
    else:
        before, after = (_hits(networks[name]) for name in compare)
        members = {
            "fixed": ~before & after,
            "broken": before & ~after,
            "both_right": before & after,
            "both_wrong": ~before & ~after,
        }
    painter = _Painter(networks, images, gallery_images or images, class_names, k, side)
    made = []
    for key, heading, explanation in groups or (SINGLE if compare is None else COMPARED):
        chosen = _draw(np.flatnonzero(members[key]), labels, per_group, draw)
        rows = tuple(painter.row(query) for query in chosen)
        made.append(Group(key, heading, explanation, int(members[key].sum()), rows))
    return Gallery(title, len(labels), k, tuple(made), compare, split=gallery_images is not None)


def _check(networks: Mapping[str, Neighbours], compare: tuple[str, str] | None, k: int) -> None:
    if not networks or any(name not in networks for name in compare or ()):
        raise UserError(f"the gallery compares {compare} but has {sorted(networks)}; give the neighbours of both.")
    first = next(iter(networks.values()))
    for name, found in networks.items():
        if found.indices.shape[1] < k:
            raise UserError(
                f"the gallery shows {k} neighbours and {name} has {found.indices.shape[1]}; search for more."
            )
        same = found.query_labels.equal(first.query_labels) and found.gallery_labels.equal(first.gallery_labels)
        if not same:
            raise UserError(f"{name} was searched with other images than the first network; use one test set for all.")


def _hits(found: Neighbours) -> np.ndarray:
    nearest = found.indices[:, 0]
    right = (found.gallery_labels[nearest.clamp(min=0)] == found.query_labels) & (nearest >= 0)
    return right.numpy()


def _draw(members: np.ndarray, labels: np.ndarray, count: int, draw: np.random.Generator) -> list[int]:
    """Random members: first one of each class in random order, then the others."""
    mixed = draw.permutation(members)
    seen: set[int] = set()
    fresh: list[int] = []
    again: list[int] = []
    for row in mixed.tolist():
        (again if labels[row] in seen else fresh).append(row)
        seen.add(labels[row])
    return [*fresh, *again][:count]


class _Painter:
    def __init__(
        self,
        networks: Mapping[str, Neighbours],
        query_images: ImageOf,
        gallery_images: ImageOf,
        class_names: Sequence[str],
        k: int,
        side: int,
    ):
        self.networks, self.class_names, self.k, self.side = networks, class_names, k, side
        self.query_images, self.gallery_images = query_images, gallery_images

    def row(self, query: int) -> QueryRow:
        found = tuple((name, self._tiles(name, neighbours, query)) for name, neighbours in self.networks.items())
        label = int(next(iter(self.networks.values())).query_labels[query])
        name = self.class_names[label]
        return QueryRow(photograph(self.query_images(query), f"Query: class {name}", self.side), name, found)

    def _tiles(self, network: str, found: Neighbours, query: int) -> tuple[Tile, ...]:
        tiles = []
        for rank, row in enumerate(found.indices[query, : self.k].tolist(), start=1):
            if row < 0:
                break
            label = int(found.gallery_labels[row])
            right = label == int(found.query_labels[query])
            name = self.class_names[label]
            alt = f"{network}, neighbour {rank}: class {name}, {'right' if right else 'wrong'}"
            tiles.append(Tile(photograph(self.gallery_images(row), alt, self.side), name, right))
        return tuple(tiles)
