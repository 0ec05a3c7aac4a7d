"""Any folder of class folders, with or without a part to train on and one to test on."""

import os
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from metric_kd.data.decode import EXTENSIONS
from metric_kd.data.parts import split_parts, split_whole
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def subfolders(root: "str | Path") -> list[str]:
    """Sorted names of the folders in ``root``, hidden ones left out."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and _shown(e.name))


def images_below(folder: "str | Path") -> list[str]:
    """Sorted paths of all image files in a folder, at any depth; hidden files and folders are left out."""
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = filter(_shown, folders)
        found += [os.path.join(where, f) for f in files if _shown(f) and os.path.splitext(f)[1].lower() in EXTENSIONS]
    return sorted(found)


def scan(root: "str | Path", name: str, classes: "list[str] | None" = None) -> ImageRecords:
    """Every class folder below ``root`` (or those named, which may be deeper) with its images, as records.

    Classes are sorted; those without images are left out with a warning. Raises ``UserError`` where nothing is left.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"the folder {root} does not exist; point --data at a folder that holds one folder per class.")
    wanted = subfolders(root) if classes is None else sorted(classes)
    paths: list[str] = []
    names: list[str] = []
    counts: list[int] = []
    empty = []
    for label in wanted:
        images = images_below(root / label)
        if images:
            names.append(label)
            counts.append(len(images))
            paths += images
        else:
            empty.append(label)
    if not paths:
        raise UserError(f"{root} holds no class folder with images; expected {root}/<class>/<image>.")
    if empty:
        warnings.warn(f"{root}: {len(empty)} folders hold no images and are left out ({empty[0]} ...).", stacklevel=2)
    labels = np.repeat(np.arange(len(names), dtype=np.int64), counts)
    return ImageRecords(name, labels, tuple(names), paths=tuple(paths))


def unlabelled(root: "str | Path") -> ImageRecords:
    """Every image below ``root``, at any depth, as records of one class that says nothing.

    Raises ``UserError`` where there is no such folder, and where it holds no images.
    """
    if not Path(root).is_dir():
        raise UserError(f"the folder {root} does not exist; point --data at a folder of images.")
    paths = images_below(root)
    if not paths:
        raise UserError(f"{root} holds no images; point --data at a folder of images, which is searched through.")
    return ImageRecords("folder", np.zeros(len(paths), dtype=np.int64), ("unlabelled",), paths=tuple(paths))


@DATASETS.register("folder")
def folder(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    flip: bool = True,
) -> Splits:
    """``<root>/<class>/**/<image>``, or ``<root>/train`` and ``<root>/test`` (or ``<root>/val``) of that form.

    With two parts: where both hold the same classes, train/ of the training classes and test/ of the others; where they
    are disjoint, as they are. For a classifier: train/ and test/ of all classes, or, without parts, one in five
    images of each class tests. flip: false for characters and other things that a mirror changes.
    """
    root = Path(root)
    for tested in ("test", "val"):
        if all((root / part).is_dir() and subfolders(root / part) for part in ("train", tested)):
            train, test = (_with_flip(scan(root / part, "folder"), flip) for part in ("train", tested))
            return split_parts(train, test, train_classes, task)
    return split_whole(_with_flip(scan(root, "folder"), flip), train_classes, task)


def _with_flip(records: ImageRecords, flip: bool) -> ImageRecords:
    return replace(records, flip=flip)
