"""Any folder of class folders, with or without a part to train on and one to test on."""

import os
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from metric_kd.data.decode import EXTENSIONS
from metric_kd.data.parts import split_parts, split_whole
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

SYSTEM = {"__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin", "system volume information"}
"""Folders that systems make among one's own."""
BESIDE = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".xmp", ".aae"} | {
    ".npy", ".npz", ".mat", ".index", ".db", ".ini"
}  # fmt: skip
"""Endings of what lies beside images and is no image: lists, notes, thumbnails of systems."""


def _shown(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM


def subfolders(root: "str | Path") -> list[str]:
    """Sorted names of the folders in ``root``; hidden ones, and links to a folder that holds ``root``, are left out."""
    whole = os.path.realpath(root)

    def counts(entry: "os.DirEntry[str]") -> bool:
        if not _shown(entry.name) or not os.path.isdir(entry.path):
            return False
        target = os.path.realpath(entry.path) if entry.is_symlink() else None
        return target is None or os.path.commonpath([target, whole]) != target

    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if counts(entry))


def is_image(name: "str | Path") -> bool:
    """By its ending."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def images_below(folder: "str | Path", flag: str = "--data", left: "Counter[str] | None" = None) -> list[str]:
    """Sorted paths of all image files in a folder, at any depth; what is hidden, and folders that are links, are left out.

    left: is told the endings of other files. Raises ``UserError``, naming the flag, where a folder among them cannot be
    read: its images would seem to be gone.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{flag}: cannot read the folder {error.filename} ({error.strerror}); permit it, or move it away."
        )

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = filter(_shown, folders)
        for name in filter(_shown, files):
            ending = os.path.splitext(name)[1].lower()
            if ending in EXTENSIONS:
                found.append(os.path.join(where, name))
            elif left is not None and ending not in BESIDE:
                left[ending] += 1
    return sorted(found)


def images_in(folder: "str | Path", flag: str = "--images") -> list[str]:
    """The images below a folder that a flag names, as :func:`images_below`, with a warning that counts other files.

    Raises ``UserError``, naming the flag, where there are none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{flag} {root} is no folder; give one that holds images.")
    left: Counter[str] = Counter()
    found = sorted(str(Path(path)) for path in images_below(root, flag, left))
    if not found:
        raise UserError(f"{flag} {root} holds no images{_but(left)}; give another folder.")
    _tell(root, left)
    return found


def _but(left: "Counter[str]") -> str:
    return f" that can be read, but {_counted(left)}" if left else ""


def _counted(left: "Counter[str]") -> str:
    """3 .heic, 1 .dng, as words."""
    kinds = sorted(left.items(), key=lambda kind: (-kind[1], kind[0]))
    words = [f"{count} {ascii(ending)[1:-1] or 'without an ending'}" for ending, count in kinds[:5]]
    return ", ".join([*words, *([f"{sum(count for _, count in kinds[5:])} more"] if kinds[5:] else [])])


def _tell(root: "str | Path", left: "Counter[str]") -> None:
    """Warn of files that are left out as no images, by their endings."""
    if left:
        files = "1 file was" if left.total() == 1 else f"{left.total()} files were"
        warnings.warn(
            f"{root}: {files} left out, as no image that can be read ends so: {_counted(left)}.", stacklevel=3
        )


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
    left: Counter[str] = Counter()
    for label in wanted:
        images = images_below(root / label, left=left)
        if images:
            names.append(label)
            counts.append(len(images))
            paths += images
        else:
            empty.append(label)
    if not paths:
        raise UserError(f"{root} holds no class folder with images{_but(left)}; expected {root}/<class>/<image>.")
    _tell(root, left)
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
    left: Counter[str] = Counter()
    paths = images_below(root, left=left)
    if not paths:
        raise UserError(
            f"{root} holds no images{_but(left)}; point --data at a folder of images, which is searched through."
        )
    _tell(root, left)
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
