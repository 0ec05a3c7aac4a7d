"""Cars-196: 196 models of cars (Krause, Stark, Deng and Fei-Fei, 3dRR workshop at ICCV 2013)."""

import os
from pathlib import Path

import numpy as np

from metric_kd.data.download import Source, check_counts, obtain
from metric_kd.data.records import DATASETS, ImageRecords, Splits, split_by_class
from metric_kd.errors import UserError

PAGE = "a copy of Stanford Cars (its own host is gone)"
PICTURES = Source(
    file="car_ims.tgz",
    md5="d5c8f0aa497503f355e17dc7886c3f14",
    urls=(
        "http://ai.stanford.edu/~jkrause/car196/car_ims.tgz",
        "http://imagenet.stanford.edu/internal/car196/car_ims.tgz",
    ),
    inner="car_ims",
    page=PAGE,
)
ANNOTATIONS = Source(
    file="cars_annos.mat",
    md5="b407c6086d669747186bd1d764ff9dbc",
    urls=(
        "http://ai.stanford.edu/~jkrause/car196/cars_annos.mat",
        "http://imagenet.stanford.edu/internal/car196/cars_annos.mat",
    ),
    inner="",
    page=PAGE,
)
IMAGES, CLASSES = 16_185, 196


@DATASETS.register("cars196")
def cars196(root: "str | Path", *, train_classes: "int | list[str] | None" = None, download: bool = True) -> Splits:
    """Classes 1-98 train (8,054 images), 99-196 test (8,131)."""
    return split_by_class(parse(locate(root, download)), train_classes)


def locate(root: "str | Path", download: bool = True) -> Path:
    """The folder with ``car_ims/`` and ``cars_annos.mat``: ``root`` itself, in it, or downloaded into it."""
    root = Path(root)
    folders = [root, *(root / name for name in ("cars196", "CARS196", "stanford_cars"))]
    for folder in folders:
        if (folder / "cars_annos.mat").is_file() and (folder / "car_ims").is_dir():
            return folder
        if any((folder / split).is_dir() for split in ("cars_train", "cars_test")):
            raise UserError(
                f"{folder} holds Stanford Cars by train and test (cars_train/, cars_test/), whose files have other "
                f"names; put {PICTURES.file} and {ANNOTATIONS.file} there instead."
            )
    home = next((f for f in folders if (f / PICTURES.file).is_file() or (f / "car_ims").is_dir()), root)
    obtain(home, ANNOTATIONS, download)
    obtain(home, PICTURES, download)
    return home


def parse(folder: Path) -> ImageRecords:
    """Records from ``annotations`` (relative_im_path, class 1-196) and ``class_names``, with their counts verified."""
    from scipy.io import loadmat

    file = folder / "cars_annos.mat"
    try:
        content = loadmat(file, squeeze_me=True)
        annotations = np.atleast_1d(content["annotations"])
        names = tuple(str(name) for name in np.atleast_1d(content["class_names"]))
        files = [str(path) for path in annotations["relative_im_path"]]
        labels = annotations["class"].astype(np.int64) - 1
    except Exception as error:  # scipy raises many types for broken files; each means another file than the published
        raise UserError(f"{file} is not the annotation file of Cars-196 ({error}); get {file.name} again.") from error
    found = (len(files), len(np.unique(labels)))
    check_counts("Cars-196", folder, found, (IMAGES, CLASSES))
    if labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f"{file} names {len(names)} classes but uses others; get {file.name} again.")
    return ImageRecords("cars196", labels, names, paths=tuple(os.path.join(folder, path) for path in files))
