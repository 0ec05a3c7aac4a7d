"""ImageRecords: what a data set is once it has been read, and how it is split by class or by image."""

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from metric_kd.errors import UserError
from metric_kd.registry import Registry

Task = Literal["embedding", "classification"]
"""What is learnt: an embedding is tested on classes it has not seen, a classifier on new images of the same classes."""


@dataclass(frozen=True)
class ImageRecords:
    """N labelled images, as files or as pixels in memory.

    labels: (N,) int64 in 0 .. len(class_names)-1. Exactly one of ``paths`` (N file names) and ``pixels`` (N, H, W, 3)
    uint8 is given. query, gallery: (N,) bool, or None where every image is both. cameras: (N,) int64, which camera took
    each image, or None where that does not matter. flip: whether a mirrored image still shows its class (false for
    characters). mean, std: per channel in 0..1, or None for ImageNet's.
    """

    name: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    paths: tuple[str, ...] | None = None
    pixels: np.ndarray | None = None
    query: np.ndarray | None = None
    gallery: np.ndarray | None = None
    cameras: np.ndarray | None = None
    flip: bool = True
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.paths is None) == (self.pixels is None):
            raise ValueError("ImageRecords takes either paths or pixels.")
        for column in (self.paths, self.pixels, self.query, self.gallery, self.cameras):
            if column is not None and len(column) != len(self.labels):
                raise ValueError("every column of ImageRecords has one entry per image.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def select(self, rows: np.ndarray, *, renumber: bool = True) -> "ImageRecords":
        """The given rows (indices or mask), with classes renumbered to those that remain, in their order.

        Without ``renumber`` labels and class names stay those of the whole, even of classes that lose every image.
        """
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows)
        labels, names = self.labels[rows], self.class_names
        if renumber:
            kept, labels = np.unique(labels, return_inverse=True)
            names = tuple(names[c] for c in kept)
        return replace(
            self,
            labels=labels.astype(np.int64),
            class_names=names,
            paths=None if self.paths is None else tuple(self.paths[r] for r in rows),
            pixels=None if self.pixels is None else self.pixels[rows],
            query=None if self.query is None else self.query[rows],
            gallery=None if self.gallery is None else self.gallery[rows],
            cameras=None if self.cameras is None else self.cameras[rows],
        )

    def of_classes(self, classes: np.ndarray) -> "ImageRecords":
        """The images of the given class numbers."""
        return self.select(np.isin(self.labels, classes))

    def with_classes(self, names: tuple[str, ...]) -> "ImageRecords":
        """The images of the named classes, numbered by their place in ``names``; a class may have none."""
        if names == self.class_names:
            return self
        number = {name: k for k, name in enumerate(names)}
        labels = np.array([number.get(name, -1) for name in self.class_names], dtype=np.int64)[self.labels]
        chosen = self.select(labels >= 0, renumber=False)
        return replace(chosen, labels=labels[labels >= 0], class_names=names)

    def fingerprint(self) -> str:
        """16 hex digits over labels, class names, cameras and file names or pixels: equal data, equal fingerprint."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update("\0".join(self.class_names).encode(errors="surrogateescape"))  # names need not be UTF-8
        if self.cameras is not None:
            digest.update(self.cameras.tobytes())
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).data)
        else:
            assert self.paths is not None
            names = "\0".join("/".join(p.replace("\\", "/").split("/")[-3:]) for p in self.paths)
            digest.update(names.encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


class Splits(NamedTuple):
    """Training and test images: of disjoint classes for an embedding, of the same classes for a classifier."""

    train: ImageRecords
    test: ImageRecords


DATASETS: Registry = Registry("dataset")
"""name -> function(root, **options) -> Splits, the class-disjoint split.

A function with a parameter ``task`` (a :data:`Task`) gives the classification split as well; one with a parameter
``labels`` ("fine" or "coarse") has two kinds of labels.
"""


def split_by_class(records: ImageRecords, train_classes: "int | list[str] | None" = None) -> Splits:
    """Class-disjoint halves: the first ``train_classes`` classes (half of them, rounded down, by default) train.

    A list of class names trains exactly those. Raises ``UserError`` where either side would be empty.
    """
    names = records.class_names
    if train_classes is None:
        train_classes = len(names) // 2
    if isinstance(train_classes, int):
        chosen = np.arange(len(names)) < train_classes
    else:
        chosen = _named(records, train_classes)
    if not chosen.any() or chosen.all():
        raise UserError(
            f"{records.name} has {len(names)} classes and --train_classes takes {int(chosen.sum())} of them; "
            "leave at least one class on each side."
        )
    return Splits(records.of_classes(np.flatnonzero(chosen)), records.of_classes(np.flatnonzero(~chosen)))


def _named(records: ImageRecords, names: list[str]) -> np.ndarray:
    """(classes,) bool: which classes are in the list; ``UserError`` for one that does not exist."""
    unknown = sorted(set(names) - set(records.class_names))
    if unknown:
        raise UserError(f"--train_classes names {unknown[0]!r}, which {records.name} has not; check the list.")
    return np.isin(np.array(records.class_names, dtype=object), names)


def classes_to_learn(records: ImageRecords, train_classes: "int | list[str] | None" = None) -> tuple[str, ...]:
    """The classes of a classifier, in the data set's order: all, the first ``train_classes``, or those named.

    Raises ``UserError`` for more classes than there are, unknown names, and fewer than two.
    """
    names = records.class_names
    if isinstance(train_classes, int):
        if train_classes > len(names):
            raise UserError(
                f"{records.name} has {len(names)} classes and --train_classes asks for {train_classes}; give fewer."
            )
        names = names[:train_classes]
    elif train_classes is not None:
        names = tuple(name for name, chosen in zip(names, _named(records, train_classes), strict=True) if chosen)
    if len(names) < 2:
        raise UserError(f"a classifier of {records.name} would have {len(names)} class; give it two or more.")
    return names


def split_by_image(records: ImageRecords, train_classes: "int | list[str] | None" = None) -> Splits:
    """Both sides hold the same classes: one in five images of each class tests, evenly spread; the others train.

    A class has at least one image on each side. ``train_classes`` keeps only some classes, on both sides. Raises
    ``UserError`` where a class has fewer than two images.
    """
    records = records.with_classes(classes_to_learn(records, train_classes))
    counts = np.bincount(records.labels, minlength=records.num_classes)
    if counts.min() < 2:
        name = records.class_names[counts.argmin()]
        raise UserError(
            f"{records.name}: the class {name!r} has {counts.min()} image and a classifier needs two, one of them to "
            "test; add images to it or remove it."
        )
    return _by_image(records, 0.2)


def hold_out_images(train: ImageRecords, share: float = 0.1) -> Splits:
    """(fitting part, validation part): a ``share`` of the images of each class is held out for selection.

    Both keep the labels and the class names of ``train``. The images are spread evenly over each class, at least one
    where it has two or more; a class of one image stays in the fitting part. Every held-out image is query and gallery.
    Raises ``UserError`` where nothing can be held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"a share of {share} cannot be held out; give one between 0 and 1.")
    fit, validation = _by_image(train, share)
    if not len(validation):
        raise UserError(f"{train.name} has one image per class, so none can be held out; use --select last.")
    return Splits(fit, replace(validation, query=None, gallery=None))


def _by_image(records: ImageRecords, share: float) -> Splits:
    """(the others, a share of the images of each class, from 1 to all but one), numbered as before.

    Row r of the n in its class is taken where h*r/n, rounded, steps up: h rows at equal distances.
    """
    counts = np.bincount(records.labels, minlength=records.num_classes)
    held = np.clip((counts * share + 0.5).astype(np.int64), 1, np.maximum(counts - 1, 0))
    order = np.argsort(records.labels, kind="stable")
    classes = records.labels[order]
    row = np.arange(len(order)) - (np.cumsum(counts) - counts)[classes]
    n, h = counts[classes], held[classes]
    taken = np.empty(len(order), dtype=bool)
    taken[order] = (2 * (row + 1) * h + n) // (2 * n) > (2 * row * h + n) // (2 * n)
    return Splits(records.select(~taken, renumber=False), records.select(taken, renumber=False))


def hold_out_classes(train: ImageRecords, share: float = 0.2) -> Splits:
    """(fitting part, validation part): the last ``share`` of the training classes is held out for selection.

    At least two are held out, since one class is always found; every image of theirs is query and gallery. Raises
    ``UserError`` where fewer than two would be left to train on.
    """
    held = max(2, round(train.num_classes * share))
    if train.num_classes - held < 2:
        raise UserError(
            f"{train.name} has {train.num_classes} training classes, too few to hold some out; use --select last."
        )
    fit, validation = split_by_class(train, train.num_classes - held)
    return Splits(fit, replace(validation, query=None, gallery=None))
