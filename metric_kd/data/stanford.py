"""Stanford Online Products: 22,634 products (Oh Song, Xiang, Jegelka and Savarese, CVPR 2016, arXiv 1511.06452)."""

import os
from pathlib import Path

import numpy as np

from metric_kd.data.download import Source, check_counts, obtain
from metric_kd.data.parts import split_parts
from metric_kd.data.records import DATASETS, ImageRecords, Splits
from metric_kd.errors import UserError

SOURCE = Source(
    file="Stanford_Online_Products.zip",
    md5="7f73d41a2f44250d4779881525aea32e",
    urls=(
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
    ),
    inner="Stanford_Online_Products",
    page="https://cvgl.stanford.edu/projects/lifted_struct/",
)
TRAIN = (59_551, 11_318)
TEST = (60_502, 11_316)
HEADER = "image_id class_id super_class_id path"


@DATASETS.register("stanford", "sop")
def stanford(root: "str | Path", *, train_classes: "int | list[str] | None" = None, download: bool = True) -> Splits:
    """Ebay_train.txt trains (59,551 images of 11,318 classes), Ebay_test.txt tests (60,502 of 11,316).

    With ``train_classes`` both files are joined and split by class; classes are named by their zero-filled number.
    """
    folder = locate(root, download)
    return split_parts(parse(folder, "train", TRAIN), parse(folder, "test", TEST), train_classes)


def locate(root: "str | Path", download: bool = True) -> Path:
    """The folder with ``Ebay_train.txt``: ``root`` itself, in it, or downloaded into it."""
    root = Path(root)
    for folder in (root, root / SOURCE.inner, root / "stanford" / SOURCE.inner, root / "stanford"):
        if (folder / "Ebay_train.txt").is_file():
            return folder
    return obtain(root, SOURCE, download)


def parse(folder: Path, part: str, counts: tuple[int, int]) -> ImageRecords:
    """Records of ``Ebay_<part>.txt``: a header, then "image_id class_id super_class_id path"; counts are verified."""
    file = folder / f"Ebay_{part}.txt"
    try:
        header, *lines = file.read_text(encoding="utf-8").splitlines() or [""]
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); unpack {SOURCE.file} again.") from error
    cells = [line.split(maxsplit=3) for line in lines if line.strip()]
    if header.split() != HEADER.split() or any(len(c) != 4 or not c[1].isdigit() for c in cells):
        raise UserError(f"{file} is not a list of Stanford Online Products; unpack {SOURCE.file} again.")
    classes, labels = np.unique(np.array([int(c[1]) for c in cells], dtype=np.int64), return_inverse=True)
    check_counts(f"the {part} part of Stanford Online Products", folder, (len(cells), len(classes)), counts)
    paths = tuple(os.path.join(folder, c[3].strip()) for c in cells)
    return ImageRecords("stanford", labels.astype(np.int64), tuple(f"{c:05d}" for c in classes), paths=paths)
