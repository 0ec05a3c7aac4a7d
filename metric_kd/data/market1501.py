"""Market-1501: 1,501 people before six cameras (Zheng, Shen, Tian, Wang, Wang and Tian, Scalable Person Re-identification:
A Benchmark, ICCV 2015)."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metric_kd.data.download import Source, check_counts, obtain
from metric_kd.data.folder import images_below
from metric_kd.data.records import DATASETS, ImageRecords, Splits
from metric_kd.errors import UserError

AUTHORS = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
FOLDER = "Market-1501-v15.09.15"
SOURCE = Source(
    file=f"{FOLDER}.zip",
    md5="65005ab7d12ec1c44de4eeafe813e68a",
    urls=(),
    inner=FOLDER,
    page=f"its authors ({AUTHORS}), or unpack it there yourself",
)
TRAIN = (12_936, 751)
QUERY = (3_368, 750)
GALLERY = (15_913, 751)
"""Images and people of bounding_box_test without the junk; the distractors count as one of the people."""

NAME = re.compile(r"(-1|\d{4})_c([1-6])s\d+_")
"""Person and camera in 0002_c1s1_000451_03.jpg; what follows is the sequence, the frame and the box in it."""
JUNK, DISTRACTOR = "-1", "0000"


@DATASETS.register("market1501")
def market1501(root: "str | Path", *, train_classes: "int | list[str] | None" = None) -> Splits:
    """bounding_box_train trains (12,936 images of 751 people); query (3,368 of 750 others) asks bounding_box_test (15,913).

    A class is a person, named by its number. Of bounding_box_test the 3,819 junk images (person -1: boxes that are
    neither right nor wrong) are left out, as the protocol wants it; the 2,798 distractors (person 0000: false alarms of
    the detector) stay in the gallery as one class that no query has. ``cameras`` are 1 to 6, in training too, so that
    held-out training people can be evaluated by the same protocol; see ``metric_kd.evaluation.reidentification``.

    The crops stand upright, 128 x 64 px, and papers enlarge them to 256 x 128 (height x width). Here every image becomes
    a square, so they are stretched: results are not those of a 256 x 128 input.

    There is no public download any more: the folder or its archive has to be put there by hand. Raises ``UserError``
    where it is missing, is not what was published, or the published split is not wanted (``train_classes``).
    """
    if train_classes is not None:
        raise UserError("market1501 has its queries in a published split of people; leave out --train_classes.")
    folder = locate(root)
    train, test = parse_train(folder), parse_test(folder)
    shared = sorted({*train.class_names} & {*test.class_names})
    if shared:
        raise UserError(
            f"{folder}: the person {shared[0]!r} is in bounding_box_train and in a test part, and as published nobody is in "
            f"both; unpack {SOURCE.file} again."
        )
    return Splits(train, test)


def locate(root: "str | Path") -> Path:
    """The folder with ``bounding_box_train/``: ``root`` itself, in it, or unpacked from an archive in it."""
    root = Path(root)
    below = root / "market1501"
    for folder in (root, root / FOLDER, below / FOLDER, below):
        if any((folder / part).is_dir() for part in ("bounding_box_train", "bounding_box_test")):
            return folder
    for home in (root, below):
        if (home / SOURCE.file).is_file():
            return obtain(home, SOURCE, download=False)
    raise UserError(
        f"{root} holds no Market-1501, and its public links are gone; ask its authors ({AUTHORS}) for {SOURCE.file} and "
        f"put it, or the folder in it, into {root}."
    )


class Crop(NamedTuple):
    """One image file, the person that its name tells and the camera."""

    path: str
    person: str
    camera: int


def parse_train(folder: Path) -> ImageRecords:
    """bounding_box_train; its numbers of images and people are verified."""
    return _records(_people(folder, "bounding_box_train", TRAIN))


def parse_test(folder: Path) -> ImageRecords:
    """The queries, then the gallery without junk, with masks that tell them apart; their numbers are verified."""
    queries = _people(folder, "query", QUERY)
    offered = [crop for crop in _crops(folder, "bounding_box_test") if crop.person != JUNK]
    _verify(folder, "bounding_box_test", offered, GALLERY)
    asks = np.arange(len(queries) + len(offered)) < len(queries)
    return _records(queries + offered, asks)


def _crops(folder: Path, part: str) -> list[Crop]:
    """All images of one part, by name; ``UserError`` for a part that is missing and a name that says no person."""
    if not (folder / part).is_dir():
        raise UserError(f"{folder} has no folder {part}; unpack the whole of {SOURCE.file} there.")
    crops = []
    for path in images_below(folder / part):
        found = NAME.match(os.path.basename(path))
        if found is None:
            raise UserError(
                f"{path} is not named as in Market-1501 (person, camera and sequence, as in 0002_c1s1_000451_03.jpg); "
                "remove it, or list your images for --dataset table."
            )
        crops.append(Crop(path, found[1], int(found[2])))
    return crops


def _people(folder: Path, part: str, published: tuple[int, int]) -> list[Crop]:
    """A part in which every image shows a person that was told."""
    crops = _crops(folder, part)
    for crop in crops:
        if crop.person in (JUNK, DISTRACTOR):
            raise UserError(
                f"{crop.path} shows no person that was told, which only bounding_box_test may hold; remove it."
            )
    _verify(folder, part, crops, published)
    return crops


def _verify(folder: Path, part: str, crops: list[Crop], published: tuple[int, int]) -> None:
    found = (len(crops), len({crop.person for crop in crops}))
    check_counts(f"{part} of Market-1501", folder / part, found, published)


def _records(crops: list[Crop], asks: np.ndarray | None = None) -> ImageRecords:
    """asks: (N,) bool, which are queries while the others are the gallery."""
    names, labels = np.unique(np.array([crop.person for crop in crops]), return_inverse=True)
    return ImageRecords(
        "market1501",
        labels.astype(np.int64),
        tuple(names.tolist()),
        paths=tuple(crop.path for crop in crops),
        query=asks,
        gallery=None if asks is None else ~asks,
        cameras=np.array([crop.camera for crop in crops], dtype=np.int64),
    )
