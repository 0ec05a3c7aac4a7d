"""Data sets by name, and what turns them into batches.

A data set is one file of this package: a function registered in ``DATASETS``. Nothing else has to be edited.
"""

import importlib
import inspect
import pkgutil
from typing import Any

from metric_kd.data.batches import ClassBalancedBatches, ShuffledBatches
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import DATASETS, ImageRecords, Splits, hold_out_classes, split_by_class
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
    "hold_out_classes",
    "load_dataset",
    "split_by_class",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def load_dataset(
    name: str,
    root: str,
    *,
    train_classes: "int | list[str] | None" = None,
    download: bool = True,
    **options: Any,
) -> Splits:
    """The class-disjoint retrieval split of a data set.

    name: one of ``DATASETS``. root: the folder that holds data sets, or the data set's own folder (for ``table`` also
    the CSV file). train_classes: how many of the first classes train, or their names; None is the published split, or
    the first half. download: whether missing files may be fetched. options: what the data set takes besides.
    Raises ``UserError`` for an unknown name or option, and for data that are missing or not what they should be.
    """
    function = DATASETS[name]
    known = [p for p in inspect.signature(function).parameters if p != "root"]
    for option in options:
        if option not in known:
            raise one_of(f"option of the dataset {name}", option, known)
    if isinstance(train_classes, int) and train_classes < 1:
        raise UserError(f"--train_classes {train_classes} leaves nothing to train on; give 1 or more.")
    if "download" in known:
        options["download"] = download
    return function(root, train_classes=train_classes, **options)
