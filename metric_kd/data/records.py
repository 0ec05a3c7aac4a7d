"""ImageRecords: what a data set is once it has been read, and how it is split into disjoint classes."""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from metric_kd.errors import UserError
from metric_kd.registry import Registry


@dataclass(frozen=True)
class ImageRecords:
    """N labelled images, as files or as pixels in memory.

    labels: (N,) int64 in 0 .. len(class_names)-1. Exactly one of ``paths`` (N file names) and ``pixels`` (N, H, W, 3)
    uint8 is given. query, gallery: (N,) bool, or None where every image is both. flip: whether a mirrored image still
    shows its class (false for characters). mean, std: per channel in 0..1, or None for ImageNet's.
    """

    name: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    paths: tuple[str, ...] | None = None
    pixels: np.ndarray | None = None
    query: np.ndarray | None = None
    gallery: np.ndarray | None = None
    flip: bool = True
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if (self.paths is None) == (self.pixels is None):
            raise ValueError("ImageRecords takes either paths or pixels.")
        for column in (self.paths, self.pixels, self.query, self.gallery):
            if column is not None and len(column) != len(self.labels):
                raise ValueError("every column of ImageRecords has one entry per image.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def select(self, rows: np.ndarray) -> "ImageRecords":
        """The given rows (indices or mask), with classes renumbered to those that remain, in their order."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows)
        kept, labels = np.unique(self.labels[rows], return_inverse=True)
        return replace(
            self,
            labels=labels.astype(np.int64),
            class_names=tuple(self.class_names[c] for c in kept),
            paths=None if self.paths is None else tuple(self.paths[r] for r in rows),
            pixels=None if self.pixels is None else self.pixels[rows],
            query=None if self.query is None else self.query[rows],
            gallery=None if self.gallery is None else self.gallery[rows],
        )

    def of_classes(self, classes: np.ndarray) -> "ImageRecords":
        """The images of the given class numbers."""
        return self.select(np.isin(self.labels, classes))

    def fingerprint(self) -> str:
        """16 hex digits over labels, class names and file names or pixels: equal data, equal fingerprint."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update("\0".join(self.class_names).encode())
        if self.pixels is not None:
            digest.update(np.ascontiguousarray(self.pixels).data)
        else:
            assert self.paths is not None
            digest.update("\0".join("/".join(p.replace("\\", "/").split("/")[-3:]) for p in self.paths).encode())
        return digest.hexdigest()[:16]


class Splits(NamedTuple):
    """Training and test images; their classes are disjoint in a retrieval task."""

    train: ImageRecords
    test: ImageRecords


DATASETS: Registry = Registry("dataset")
"""name -> function(root, **options) -> Splits, the class-disjoint retrieval split."""


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
        unknown = sorted(set(train_classes) - set(names))
        if unknown:
            raise UserError(f"--train_classes names {unknown[0]!r}, which {records.name} has not; check the list.")
        chosen = np.isin(np.array(names, dtype=object), train_classes)
    if not chosen.any() or chosen.all():
        raise UserError(
            f"{records.name} has {len(names)} classes and --train_classes takes {int(chosen.sum())} of them; "
            "leave at least one class on each side."
        )
    return Splits(records.of_classes(np.flatnonzero(chosen)), records.of_classes(np.flatnonzero(~chosen)))


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
