"""Tiny ImageNet: 200 classes of ImageNet at 64 px (Stanford CS231n; Le and Yang, Tiny ImageNet visual recognition
challenge, 2015)."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from metric_kd.data.download import Source, obtain
from metric_kd.data.folder import scan
from metric_kd.data.parts import split_parts
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

FOLDER = "tiny-imagenet-200"
SOURCE = Source(
    "tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    FOLDER,
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)
ANNOTATIONS = "val_annotations.txt"
MEAN, STD = (0.480, 0.448, 0.398), (0.253, 0.245, 0.260)


@DATASETS.register("tinyimagenet")
def tinyimagenet(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    download: bool = True,
) -> Splits:
    """train/ images of the first 100 classes train, val/ images of the other 100 test; 64 px.

    For a classifier: train/ (100,000 images) and val/ (10,000), of 200 classes, which are named by their WordNet
    numbers. The published test/ has no labels and is not read. Raises ``UserError`` for a tree that is not whole.
    """
    root = Path(root)
    places = (root, root / FOLDER, root / "tinyimagenet" / FOLDER)
    folder = next((place for place in places if (place / "val" / ANNOTATIONS).is_file()), None)
    folder = folder or obtain(root, SOURCE, download)
    train = replace(scan(folder / "train", "tinyimagenet"), mean=MEAN, std=STD)
    return split_parts(train, _validation(folder, train), train_classes, task)


def _validation(folder: Path, train: ImageRecords) -> ImageRecords:
    """The images that val_annotations.txt lists: a name, its class and a box in every line."""
    file = folder / "val" / ANNOTATIONS
    try:
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file} ({error}); unpack {SOURCE.file} again.") from error
    number = {name: k for k, name in enumerate(train.class_names)}
    for words in lines:
        if len(words) < 2 or words[1] not in number:
            raise UserError(
                f"{file} has the line {' '.join(words)!r}, which names no image and class of train/; unpack "
                f"{SOURCE.file} again."
            )
    if not lines:
        raise UserError(f"{file} is empty; unpack {SOURCE.file} again.")
    labels = np.array([number[words[1]] for words in lines], dtype=np.int64)
    paths = tuple(str(folder / "val" / "images" / words[0]) for words in lines)
    return replace(train, labels=labels, paths=paths)
