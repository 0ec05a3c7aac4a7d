"""STL-10 (Coates, Lee and Ng, An analysis of single-layer networks in unsupervised feature learning, AISTATS 2011)."""

from pathlib import Path

import numpy as np

from metric_kd.data.download import Source, obtain
from metric_kd.data.parts import split_parts
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

SIDE = 96
FOLDER = "stl10_binary"
PAGE = "https://cs.stanford.edu/~acoates/stl10/"
SOURCE = Source(
    "stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
    ("http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",),
    FOLDER,
    PAGE,
)
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
MEAN, STD = (0.4468, 0.4399, 0.4068), (0.2419, 0.2384, 0.2541)


@DATASETS.register("stl10")
def stl10(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    download: bool = True,
) -> Splits:
    """train images of the first 5 classes train, test images of the other 5 test; 96 px.

    For a classifier: the published parts, 5,000 images to train and 8,000 to test, of 10 classes. The unlabelled images
    are not read. Raises ``UserError`` for files that are cut or are something else.
    """
    root = Path(root)
    places = (root, root / FOLDER, root / "stl10" / FOLDER)
    folder = next((place for place in places if (place / "train_X.bin").is_file()), None)
    folder = folder or obtain(root, SOURCE, download)
    return split_parts(_part(folder, "train"), _part(folder, "test"), train_classes, task)


def _part(folder: Path, part: str) -> ImageRecords:
    """The images of PART_X.bin, column by column in three planes each, and the classes of PART_y.bin, counted from 1."""
    planes, classes = (_bytes(folder / f"{part}_{kind}.bin") for kind in "Xy")
    if len(planes) != len(classes) * 3 * SIDE * SIDE or not len(classes):
        raise UserError(
            f"{folder} has {len(classes):,} classes in {part}_y.bin and {len(planes) / (3 * SIDE * SIDE):,.1f} images in "
            f"{part}_X.bin; unpack {SOURCE.file} from {PAGE} again."
        )
    if classes.min() < 1 or classes.max() > len(CLASSES):
        raise UserError(f"{folder / part}_y.bin holds no classes 1 to {len(CLASSES)}; unpack {SOURCE.file} again.")
    return ImageRecords(
        "stl10",
        classes.astype(np.int64) - 1,
        CLASSES,
        pixels=np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)),
        mean=MEAN,
        std=STD,
    )


def _bytes(file: Path) -> np.ndarray:
    try:
        return np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); unpack {SOURCE.file} from {PAGE} again.") from error
