"""Omniglot: handwritten characters of 50 alphabets (Lake, Salakhutdinov and Tenenbaum, Science 350(6266), 2015)."""

from dataclasses import replace
from pathlib import Path

from metric_kd.data.download import Source, obtain
from metric_kd.data.folder import scan, subfolders
from metric_kd.data.parts import join, split_parts, split_whole
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

PAGE = "https://github.com/brendenlake/omniglot"
MIRROR = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
BACKGROUND, EVALUATION = (
    Source(f"{part}.zip", md5, (f"{MIRROR}/{part}.zip",), part, PAGE)
    for part, md5 in (
        ("images_background", "68d2efa1b9178cc56df9314c21c6e718"),
        ("images_evaluation", "6b91aef0f799c5bb55b94e3f2daec811"),
    )
)

MEAN, STD = (0.92,) * 3, (0.25,) * 3
"""Measured on 3,140 characters of the background set at 73 px (0.922, 0.250); smaller images have less contrast."""


@DATASETS.register("omniglot")
def omniglot(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    download: bool = True,
) -> Splits:
    """A class is a character of an alphabet, "alphabet/character"; mirrored images are not used.

    torchvision's layout (``omniglot-py/images_background`` and ``images_evaluation``): background trains and evaluation
    tests, unless ``train_classes`` is given. ``<alphabet>/<character>/*.png`` in ``root``, ``omniglot/`` or
    ``omniglot_small/``: the first half of the characters trains. A missing data set is downloaded to ``omniglot-py/``.
    For a classifier: all characters, and one in five drawers tests (a character has one image of each).
    """
    root = Path(root)
    for folder in (root, root / "omniglot-py"):
        if all((folder / source.inner).is_dir() for source in (BACKGROUND, EVALUATION)):
            return _published(folder, train_classes, task, download=False)
    for folder in (root, root / "omniglot", root / "omniglot_small"):
        if folder.is_dir() and (characters := _characters(folder)):
            return split_whole(_records(folder, characters), train_classes, task)
    return _published(root / "omniglot-py", train_classes, task, download)


def _published(folder: Path, train_classes: "int | list[str] | None", task: Task, download: bool) -> Splits:
    parts = []
    for source in (BACKGROUND, EVALUATION):
        part = obtain(folder, source, download)
        characters = _characters(part)
        if not characters:
            raise UserError(f"{part} holds no <alphabet>/<character>/*.png; delete it to unpack it again.")
        parts.append(_records(part, characters))
    if task == "classification":  # the two parts have no character in common
        return split_whole(join(parts[0], parts[1]), train_classes, task)
    return split_parts(parts[0], parts[1], train_classes)


def _characters(folder: Path) -> list[str]:
    """Sorted "alphabet/character" of the folders that hold PNG files directly."""
    return [
        f"{alphabet}/{character}"
        for alphabet in subfolders(folder)
        for character in subfolders(folder / alphabet)
        if next((folder / alphabet / character).glob("*.png"), None)
    ]


def _records(folder: Path, characters: list[str]) -> ImageRecords:
    return replace(scan(folder, "omniglot", characters), flip=False, mean=MEAN, std=STD)
