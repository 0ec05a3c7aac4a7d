"""CUB-200-2011: 200 kinds of birds (Wah, Branson, Welinder, Perona and Belongie, Caltech CNS-TR-2011-001)."""

import os
from pathlib import Path

import numpy as np

from metric_kd.data.download import Source, check_counts, obtain
from metric_kd.data.folder import images_below, subfolders
from metric_kd.data.records import DATASETS, ImageRecords, Splits, split_by_class
from metric_kd.errors import UserError

SOURCE = Source(
    file="CUB_200_2011.tgz",
    md5="97eceeb196236b17998738112f37df78",
    urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
    inner="CUB_200_2011",
    page="https://data.caltech.edu/records/65de6-vp158",
)
IMAGES, CLASSES = 11_788, 200
IMAGES_2010 = 6_033


@DATASETS.register("cub200", "cub200_2011")
def cub200(root: "str | Path", *, train_classes: "int | list[str] | None" = None, download: bool = True) -> Splits:
    """Classes 1-100 train (5,864 images), 101-200 test (5,924)."""
    return split_by_class(parse(locate(root, download)), train_classes)


def locate(root: "str | Path", download: bool = True) -> Path:
    """The folder with ``images.txt`` and ``images/``: ``root`` itself, in it, or downloaded into it."""
    root = Path(root)
    for folder in (root, root / "CUB_200_2011", root / "cub200" / "CUB_200_2011", root / "cub200"):
        if (folder / "images.txt").is_file():
            return folder
    for folder in (root, root / "CUB_200_2011", root / "CUB_200", root / "cub200"):
        if (folder / "images").is_dir():
            _refuse(folder)
    return obtain(root, SOURCE, download)


def _refuse(folder: Path) -> None:
    """Say what is wrong with a folder that has ``images/`` but no ``images.txt``."""
    count = sum(len(images_below(folder / "images" / c)) for c in subfolders(folder / "images"))
    if count == IMAGES_2010 or (folder / "lists").is_dir() or (folder / "annotations-mat").is_dir():
        raise UserError(
            f"{folder} is CUB-200 of 2010 ({count:,} images), another collection than CUB-200-2011 ({IMAGES:,}); "
            f"get {SOURCE.file} from {SOURCE.page}."
        )
    raise UserError(
        f"{folder} has images/ but no images.txt, so it is not CUB-200-2011 as published; unpack {SOURCE.file} from "
        f"{SOURCE.page} there, or use --dataset folder."
    )


def parse(folder: Path) -> ImageRecords:
    """images.txt ("id class/file") and image_class_labels.txt ("id class"), with their counts verified."""
    files = dict(_table(folder / "images.txt"))
    classes = dict(_table(folder / "image_class_labels.txt"))
    if files.keys() != classes.keys():
        raise UserError(f"{folder}: images.txt and image_class_labels.txt disagree; unpack {SOURCE.file} again.")
    order = sorted(files, key=int)
    names = {int(classes[k]): os.path.dirname(files[k]) for k in order}
    hint = "this is CUB-200 of 2010, so get the 2011 edition" if len(order) == IMAGES_2010 else "get the whole of it"
    check_counts("CUB-200-2011", folder, (len(order), len(names)), (IMAGES, CLASSES), hint)
    number = {c: k for k, c in enumerate(sorted(names))}
    labels = np.array([number[int(classes[k])] for k in order], dtype=np.int64)
    paths = tuple(os.path.join(folder, "images", files[k]) for k in order)
    return ImageRecords("cub200", labels, tuple(names[c] for c in sorted(names)), paths=paths)


def _table(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); unpack {SOURCE.file} again.") from error
    pairs = [tuple(line.split(" ", 1)) for line in lines if line.strip()]
    if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise UserError(f"{file} is not the list of CUB-200-2011; unpack {SOURCE.file} again.")
    return [(key, value.strip()) for key, value in pairs]
