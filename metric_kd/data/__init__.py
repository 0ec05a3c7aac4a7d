"""Data sets by name, and what turns them into batches.

A data set is one file of this package: a function registered in ``DATASETS``. Nothing else has to be edited.
"""

import importlib
import inspect
import pkgutil
from typing import Any, get_args

from metric_kd.data.batches import ClassBalancedBatches, ShuffledBatches
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import (
    DATASETS,
    ImageRecords,
    Splits,
    Task,
    hold_out_classes,
    hold_out_images,
    split_by_class,
)
from metric_kd.data.transforms import Geometry
from metric_kd.errors import UserError, one_of

__all__ = [
    "DATASETS",
    "ClassBalancedBatches",
    "Geometry",
    "ImageLoader",
    "ImageRecords",
    "ShuffledBatches",
    "Splits",
    "Task",
    "hold_out_classes",
    "hold_out_images",
    "load_dataset",
    "split_by_class",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def load_dataset(
    name: str,
    root: str,
    *,
    task: Task = "embedding",
    labels: str = "fine",
    train_classes: "int | list[str] | None" = None,
    download: bool = True,
    **options: Any,
) -> Splits:
    """The split of a data set that a task needs.

    name: one of ``DATASETS``. root: the folder that holds data sets, or the data set's own folder (for ``table`` also
    the CSV file). task: "embedding" trains on some classes and tests on the others; "classification" trains and tests
    on the same classes, numbered alike. labels: "coarse" takes superclasses for classes (``cifar100``). train_classes:
    how many of the first classes, or their names. For an embedding they train, and None is the published split, or the
    first half; a classifier is trained and tested on them alone, and None is all. download: whether missing files may
    be fetched. options: what the data set takes besides.
    Raises ``UserError`` for an unknown name or option, for a task or labels that the data set does not offer, and for
    data that are missing or not what they should be.
    """
    function = DATASETS[name]
    known = _parameters(name)
    for option in options:
        if option not in known:
            raise one_of(f"option of the dataset {name}", option, known)
    options.update(_offered(name, "task", task, get_args(Task), "has no classification split"))
    options.update(_offered(name, "labels", labels, ("fine", "coarse"), "has one kind of labels"))
    if isinstance(train_classes, int) and train_classes < 1:
        raise UserError(f"--train_classes {train_classes} leaves nothing to train on; give 1 or more.")
    if "download" in known:
        options["download"] = download
    return function(root, train_classes=train_classes, **options)


def _parameters(name: str) -> list[str]:
    return [p for p in inspect.signature(DATASETS[name]).parameters if p != "root"]


def _offered(name: str, parameter: str, value: str, values: tuple[str, ...], lack: str) -> dict[str, str]:
    """The argument that a data set function gets; the first of ``values`` is what functions without it give."""
    if value not in values:
        raise one_of(parameter, value, values)
    if parameter in _parameters(name):
        return {parameter: value}
    if value != values[0]:
        able = ", ".join(other for other in DATASETS if parameter in _parameters(other))
        raise UserError(f"{name} {lack}; leave out --{parameter} {value}, or take a data set that offers it ({able}).")
    return {}
