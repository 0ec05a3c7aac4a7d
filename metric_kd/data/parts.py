"""The split of a data set that comes in two parts, train and test."""

from dataclasses import replace

import numpy as np

from metric_kd.data.records import ImageRecords, Splits, split_by_class
from metric_kd.errors import UserError


def join(first: ImageRecords, second: ImageRecords) -> ImageRecords:
    """Both parts as one, with the sorted union of their classes; both must be files."""
    names = tuple(sorted({*first.class_names, *second.class_names}))
    number = {name: k for k, name in enumerate(names)}
    labels = [np.array([number[n] for n in part.class_names], dtype=np.int64)[part.labels] for part in (first, second)]
    assert first.paths is not None and second.paths is not None
    return replace(
        first,
        labels=np.concatenate(labels),
        class_names=names,
        paths=first.paths + second.paths,
        query=_join_flags(first.query, second.query),
        gallery=_join_flags(first.gallery, second.gallery),
    )


def _join_flags(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def split_parts(train: ImageRecords, test: ImageRecords, train_classes: "int | list[str] | None" = None) -> Splits:
    """Class-disjoint split of a train part and a test part.

    Both hold the same classes: the training images of the training classes, and the test images of the others. They
    are disjoint: as they are, or, where ``train_classes`` is given, all images split by class. Raises ``UserError``
    where they overlap in part.
    """
    first, second = set(train.class_names), set(test.class_names)
    if first == second:
        return Splits(split_by_class(train, train_classes).train, split_by_class(test, train_classes).test)
    shared = sorted(first & second)
    if shared:
        only = sorted(first ^ second)[0]
        raise UserError(
            f"{train.name}: train and test share the class {shared[0]!r} but {only!r} is in one of them only; "
            "give both the same classes, or none in common."
        )
    if train_classes is None:
        return Splits(train, test)
    return split_by_class(join(train, test), train_classes)
