"""`metric-kd pack`: all images of a data set, resized once, in one file from which --pack reads them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metric_kd.cli.config import RunConfig
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.cli.unlabelled import is_unlabelled
from metric_kd.data import DATASETS, load_dataset
from metric_kd.data.decode import THREADS
from metric_kd.data.pack import Pack, Packs
from metric_kd.data.packing import AutoPack, make_pack
from metric_kd.data.records import ImageRecords, Splits
from metric_kd.data.sources import side_of
from metric_kd.data.transforms import Geometry
from metric_kd.distributed import is_main
from metric_kd.errors import UserError

FOLDER = ".packs"
"""Where --pack auto looks for packs and makes them, beside the data."""


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    if options.side is not None and options.input_size is not None:
        raise UserError("--side and --input_size both give the size; leave one of them out.")
    for key, least in (("side", 8), ("input_size", 8), ("workers", 1)):
        if (value := getattr(options, key)) is not None and value < least:
            raise UserError(f"--{key} is {value}; give {least} or more.")
    check_quality("--jpeg", options.jpeg)
    load_plugins(options.plugins)
    started = time.perf_counter()
    parts = every_image(options.dataset, options.data)
    if parts[0].paths is None:
        raise UserError(f"the images of {options.dataset} are in memory already; a pack is of image files.")
    side = options.side
    if side is None:
        paths = [path for records in parts for path in records.paths or ()]
        side = side_of(paths, Geometry(options.input_size or 224))
    place = AutoPack(folder_beside(options.data), name_of(options.dataset, options.data), lambda: parts, options.jpeg)
    pack = make_pack(
        options.out or place.file(side),
        parts,
        side,
        quality=options.jpeg,
        workers=options.workers,
        skip_unreadable=options.skip_unreadable,
        progress=True,
    )
    print(_summary(pack, time.perf_counter() - started, options.out is None))
    return 0


def _summary(pack: Pack, seconds: float, found_by_auto: bool) -> str:
    what = "pixels" if pack.quality is None else f"JPEG images of quality {pack.quality}, not bit-equal to the files"
    flags = f"--pack {'auto' if found_by_auto else pack.file}"
    flags += "" if pack.quality is None else f" --pack_jpeg {pack.quality}"
    lines = [
        f"{pack.file}: {len(pack):,} images of {pack.side} x {pack.side} px ({what}), "
        f"{pack.file.stat().st_size / 2**20:,.1f} MiB, {seconds:.1f} s"
    ]
    if not pack.readable.all():
        first = pack.names[int(pack.readable.argmin())]
        lines.append(f"skipped {int((~pack.readable).sum())} unreadable images, the first {first}")
    return "\n".join([*lines, f"read it with {flags}"])


def pack_for(config: RunConfig, splits: Splits, notes: list[str]) -> Packs | None:
    """What the loaders of a run read instead of image files, as --pack says."""
    if config.pack is None:
        return None
    if splits.train.paths is None:
        if config.pack != "auto":
            raise UserError(f"the images of {config.dataset} are in memory already; leave --pack out.")
        notes.append(f"the images of {config.dataset} are in memory already, without a pack")
        return None
    if config.pack != "auto":
        return _accepted(Pack(config.pack), config.pack_jpeg)
    bare = is_unlabelled(config)
    return AutoPack(
        folder_beside(config.data),
        "unlabelled" if bare else name_of(config.dataset, config.data),
        lambda: [*splits] if bare else [*every_image(config.dataset, config.data), *splits],
        quality=config.pack_jpeg,
        skip_unreadable=config.skip_unreadable,
        progress=is_main(),
        make=not config.dry_run,
    )


def _accepted(pack: Pack, quality: int | None) -> Pack:
    """The pack, where it holds what --pack_jpeg says."""
    if pack.quality == quality:
        return pack
    if pack.quality is None:
        raise UserError(f"{pack.file} holds pixels, not JPEG images; leave --pack_jpeg out.")
    raise UserError(
        f"{pack.file} holds JPEG images of quality {pack.quality}, which are not bit-equal to the files; say --pack_jpeg "
        f"{pack.quality} if the run may use them."
    )


def check_quality(flag: str, quality: int | None) -> None:
    """Raise ``UserError`` for a JPEG quality that there is not."""
    if quality is not None and not 1 <= quality <= 100:
        raise UserError(f"{flag} is {quality}; give a quality from 1 to 100.")


def every_image(dataset: str, data: str) -> list[ImageRecords]:
    """Training and test images of a data set, whatever the task: a pack serves both."""
    parts: list[ImageRecords] = []
    refused: list[UserError] = []
    for task in ("embedding", "classification"):
        try:
            parts += load_dataset(dataset, data, task=task)  # type: ignore[arg-type]
        except UserError as error:  # many data sets are for one of the tasks only
            refused.append(error)
    if not parts:
        raise refused[0]
    return parts


def folder_beside(data: str) -> Path:
    """Where the packs of a data folder (or of a table in it) lie."""
    return (Path(data).parent if Path(data).is_file() else Path(data)) / FOLDER


def name_of(dataset: str, data: str) -> str:
    """A data set's name in file names; several tables may lie in one folder."""
    name = DATASETS.canonical(dataset)
    return f"{name}-{Path(data).stem}" if Path(data).is_file() else name


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dataset", type=str, default="cub200", help="data set; `metric-kd list datasets`")
    parser.add_argument("--data", type=str, default="data", help="folder in which it lies (the CSV file for `table`)")
    parser.add_argument("--input_size", type=int | None, default=None, help="px that the network sees; default 224")
    parser.add_argument("--side", type=int | None, default=None, help="px before the crop, instead: 256 for 224")
    parser.add_argument("--out", type=str | None, default=None, help=f"FILE.h5; default DATA/{FOLDER}/DATASET-SIDE.h5")
    parser.add_argument(
        "--jpeg", type=int | None, default=None, help="keep JPEG images of this quality: smaller, inexact"
    )
    parser.add_argument("--workers", type=int, default=THREADS, help="threads that decode")
    parser.add_argument("--skip_unreadable", action="store_true", help="count and skip images that cannot be read")
    add_plugins(parser)
    return parser
