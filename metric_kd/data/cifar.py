"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009)."""

import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from metric_kd.data import decode
from metric_kd.data.download import Source, md5_of, obtain
from metric_kd.data.folder import scan, subfolders
from metric_kd.data.parts import split_parts
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

SIDE = 32
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Edition:
    """One of the two collections: its archive, its pickles with their md5, the keys in them, and its statistics."""

    name: str
    source: Source
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    meta: tuple[str, str]
    label_key: str
    names_key: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = Edition(
    name="cifar10",
    source=Source(
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        "cifar-10-batches-py",
        PAGE,
    ),
    train=(
        ("data_batch_1", "c99cafc152244af753f735de768cd75f"),
        ("data_batch_2", "d4bba439e000b95fd0a9bffe97cbabec"),
        ("data_batch_3", "54ebc095f3ab1f0389bbae665268c751"),
        ("data_batch_4", "634d18415352ddfa80567beed471001a"),
        ("data_batch_5", "482c414d41f54cd18b22e5b47cb7c3cb"),
    ),
    test=(("test_batch", "40351d587109b95175f43aff81a1287e"),),
    meta=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    label_key="labels",
    names_key="label_names",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Edition(
    name="cifar100",
    source=Source(
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
        "cifar-100-python",
        PAGE,
    ),
    train=(("train", "16019d7e3df5f24257cddd939b257f8d"),),
    test=(("test", "f0ef6b0ae62326f3e7ffdfab6717acfc"),),
    meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
    label_key="fine_labels",
    names_key="fine_label_names",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
COARSE = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""The 20 superclasses of CIFAR-100, from the table on ``PAGE``, in the order and spelling of the published files."""


@DATASETS.register("cifar10")
def cifar10(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    download: bool = True,
) -> Splits:
    """train images of the first 5 classes train, test images of the other 5 test.

    For a classifier: the published parts, 50,000 images to train and 10,000 to test, of all classes.
    """
    return _load(CIFAR10, Path(root), train_classes, task, download)


@DATASETS.register("cifar100")
def cifar100(
    root: "str | Path",
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    labels: str = "fine",
    download: bool = True,
) -> Splits:
    """train images of the first 50 classes train, test images of the other 50 test.

    For a classifier: the published parts, 50,000 images to train and 10,000 to test, of all classes. labels: "coarse"
    takes the 20 superclasses for classes, in either task.
    """
    return _load(CIFAR100, Path(root), train_classes, task, download, coarse=labels == "coarse")


def _load(
    edition: Edition,
    root: Path,
    train_classes: "int | list[str] | None",
    task: Task,
    download: bool,
    coarse: bool = False,
) -> Splits:
    for tree in (root, root / edition.name):
        if all((tree / part).is_dir() and subfolders(tree / part) for part in ("train", "test")):
            parts = [_tree_part(edition, tree / part) for part in ("train", "test")]
            train, test = map(_coarse, parts) if coarse else parts
            splits = split_parts(train, test, train_classes, task)
            return Splits(_decoded(splits.train), _decoded(splits.test))  # only what is used is decoded
    places = (root, root / edition.source.inner, root / edition.name / edition.source.inner)
    folder = next((f for f in places if (f / edition.meta[0]).is_file() and (f / edition.test[0][0]).is_file()), None)
    folder = folder or obtain(root, edition.source, download)
    parts = [_unpickled(edition, folder, files) for files in (edition.train, edition.test)]
    train, test = map(_coarse, parts) if coarse else parts
    return split_parts(train, test, train_classes, task)


def _coarse(records: ImageRecords) -> ImageRecords:
    """The same images with their superclasses for classes."""
    superclass = {fine: coarse for coarse, members in COARSE.items() for fine in members.split()}
    unknown = [name for name in records.class_names if name not in superclass]
    if unknown:
        raise UserError(f"CIFAR-100 as published has no class {unknown[0]!r} and so no superclass; use --labels fine.")
    present = {superclass[name] for name in records.class_names}
    names = tuple(name for name in COARSE if name in present)
    number = np.array([names.index(superclass[name]) for name in records.class_names], dtype=np.int64)
    return replace(records, labels=number[records.labels], class_names=names)


def _tree_part(edition: Edition, folder: Path) -> ImageRecords:
    return replace(scan(folder, edition.name), mean=edition.mean, std=edition.std)


def _decoded(records: ImageRecords) -> ImageRecords:
    """The same records as pixels."""
    assert records.paths is not None
    pixels = np.empty((len(records), SIDE, SIDE, 3), dtype=np.uint8)
    for k, image in enumerate(decode.each(decode.decode, records.paths, f"decode {records.name}", progress=True)):
        if isinstance(image, UserError):
            raise image
        if image.shape[1:] != (SIDE, SIDE):
            raise UserError(
                f"{records.paths[k]} is {image.shape[2]} x {image.shape[1]} px where {records.name} has {SIDE} x {SIDE}"
                "; use --dataset folder for other images."
            )
        pixels[k] = image.permute(1, 2, 0).numpy()
    return replace(records, paths=None, pixels=pixels)


def _open(folder: Path, name: str, md5: str) -> dict:
    """A pickle, opened only if it is the published file: a pickle can run any code."""
    file = folder / name
    try:
        found = md5_of(file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); unpack the archive from {PAGE} again.") from error
    if found != md5:
        raise UserError(f"{file} has the md5 {found} instead of {md5} and is not opened; get it again from {PAGE}.")
    with open(file, "rb") as stream:
        return pickle.load(stream, encoding="latin1")


def _unpickled(edition: Edition, folder: Path, files: tuple[tuple[str, str], ...]) -> ImageRecords:
    names = tuple(_open(folder, *edition.meta)[edition.names_key])
    batches = [_open(folder, name, md5) for name, md5 in files]
    planes = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
    return ImageRecords(
        edition.name,
        np.concatenate([np.asarray(batch[edition.label_key], dtype=np.int64) for batch in batches]),
        names,
        pixels=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        mean=edition.mean,
        std=edition.std,
    )
