"""The split that a task needs, of a data set that comes whole or in two parts, train and test."""

from dataclasses import replace

import numpy as np

from metric_kd.data.records import ImageRecords, Splits, Task, classes_to_learn, split_by_class, split_by_image
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
        query=_join_columns(first.query, second.query),
        gallery=_join_columns(first.gallery, second.gallery),
        cameras=_join_columns(first.cameras, second.cameras),
    )


def _join_columns(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def split_whole(
    records: ImageRecords, train_classes: "int | list[str] | None" = None, task: Task = "embedding"
) -> Splits:
    """By class for an embedding, by image for a classifier."""
    split = split_by_image if task == "classification" else split_by_class
    return split(records, train_classes)


def split_parts(
    train: ImageRecords,
    test: ImageRecords,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
) -> Splits:
    """The split of a train part and a test part.

    For an embedding it is disjoint by class. Both parts hold the same classes: the training images of the training
    classes, and the test images of the others. The parts are disjoint: as they are, or, where ``train_classes`` is
    given, all images split by class. Raises ``UserError`` where they overlap in part.

    For a classifier it is the two parts, numbered alike and restricted to ``train_classes``. A class may have no test
    images; raises ``UserError`` where one has test images only.
    """
    if task == "classification":
        return _same_classes(train, test, train_classes)
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


def _same_classes(train: ImageRecords, test: ImageRecords, train_classes: "int | list[str] | None") -> Splits:
    unseen = sorted(set(test.class_names) - set(train.class_names))
    if unseen:
        raise UserError(
            f"{train.name}: the test part has the class {unseen[0]!r} and the train part has not; give a classifier "
            "training images of every class, or learn an embedding."
        )
    names = classes_to_learn(train, train_classes)
    splits = Splits(train.with_classes(names), test.with_classes(names))
    if not len(splits.test):
        raise UserError(f"{train.name} has no test images of the chosen classes; choose others.")
    return splits
