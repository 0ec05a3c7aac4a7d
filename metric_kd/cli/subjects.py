"""What `metric-kd quantify` looks at: networks at their recorded epochs, images as each sees them, their foregrounds."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metric_kd.cli.config import QuantifyConfig
from metric_kd.cli.goals import load_splits
from metric_kd.cli.parse import parse
from metric_kd.cli.session import checked
from metric_kd.cli.stored import run_of
from metric_kd.data.decode import decode
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry
from metric_kd.deploy.embedder import images_in
from metric_kd.engine.checkpoint import find_checkpoint, restore_network
from metric_kd.engine.run_plugins import check_named
from metric_kd.engine.weight_record import Distances, checkpoints_of, read_distances
from metric_kd.errors import UserError
from metric_kd.models.layers import find_layer, weight_of
from metric_kd.quantify.concepts import cumulative_distance
from metric_kd.quantify.masks import Boxes, MaskFolder, box_mask, central_box, segmentation_mask

NETWORKS = ("teacher", "distilled", "baseline")


class Examined(NamedTuple):
    """One of the networks: epoch -> checkpoint (0 -> its result, where it was not recorded), the layer, whether to look
    behind a ReLU, the side of its images in px, what it multiplies a grey level by, and how far the layer's weights had moved
    after each epoch, or None."""

    name: str
    recorded: bool
    checkpoints: dict[int, Path]
    layer: str
    relu: bool
    size: int
    scale: float
    distance: np.ndarray | None

    @property
    def when(self) -> str:
        """Its epochs, in words."""
        return f"epochs {', '.join(map(str, self.checkpoints))}" if self.recorded else "its result"


def networks_of(config: QuantifyConfig, notes: list[str]) -> list[Examined]:
    """The networks that the flags name, each opened once: what cannot be looked at is refused here."""
    named = {name: getattr(config, name) for name in NETWORKS if getattr(config, name) is not None}
    if not named:
        raise UserError("there is no network to look at; give --distilled RUN and --baseline RUN, and --teacher RUN.")
    found = [_examined(config, name, path, notes) for name, path in named.items()]
    if config.teacher is None and config.teacher_layer is not None:
        raise UserError(
            "--teacher_layer names a layer of a teacher and there is none; give --teacher, or leave it out."
        )
    scales = [each.scale for each in found]
    if max(scales) > 1.5 * min(scales):
        notes.append(
            f"The networks multiply pixels by different factors ({min(scales):.3g} to {max(scales):.3g} per grey level), so "
            "noise of one size in their own units is not the same in their images."
        )
    if config.epochs is not None and not any(each.recorded for each in found):
        raise UserError("no weights of these networks were recorded, so there are no epochs; leave --epochs out.")
    return found


def _examined(config: QuantifyConfig, name: str, path: str, notes: list[str]) -> Examined:
    run = run_of(path)
    check_named(path, run.stored_config() or {}, config.plugins)
    recorded = {} if name == "teacher" or not Path(path).is_dir() else checkpoints_of(run.weights)
    if config.epochs is not None and recorded:
        recorded = _asked(recorded, config.epochs, name)
    checkpoints = recorded or {0: find_checkpoint(path, name)}
    if len(checkpoints) < 2 and name != "teacher":
        notes.append(f"{name}: {_why_alone(path)}, and when and how stably it learned is not known.")
    network = restore_network(next(reversed(checkpoints.values())), None, {}, name)
    layer = config.teacher_layer or config.layer if name == "teacher" else config.layer
    read = find_layer(network, layer)
    distance = None
    if len(checkpoints) > 1:
        moved = _moved(run.weights, weight_of(network, layer))
        distance = cumulative_distance(np.array(moved.path if config.distance == "step" else moved.chord), moved.start)
    relu = config.relu == "true" or (config.relu == "auto" and read.field != "embedding")
    assert network.spec.input_size is not None
    return Examined(
        name,
        bool(recorded),
        checkpoints,
        layer,
        relu,
        network.spec.input_size,
        float(network.rgb_scale.mean()),
        distance,
    )


def _why_alone(path: str) -> str:
    if not Path(path).is_dir():
        return f"{path} is one checkpoint (give its run to see how it learned), so only that is looked at"
    if checkpoints_of(run_of(path).weights):
        return "one epoch was asked for"
    return "no weights were recorded while it was trained (--record_weights), so only its result is looked at"


def _moved(folder: Path, weight: str) -> Distances:
    record = read_distances(folder)
    if weight not in record:
        raise UserError(
            f"the record in {folder} has nothing of {weight}; choose another --layer, or train the run again."
        )
    return record[weight]


def _asked(recorded: dict[int, Path], text: str, name: str) -> dict[int, Path]:
    try:
        wanted = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--epochs {text!r} is no list of epochs; write numbers as in 0,5,10.") from None
    for epoch in wanted:
        if epoch not in recorded:
            have = ",".join(map(str, recorded))
            raise UserError(f"the {name} network has no checkpoint of epoch {epoch}; it has --epochs {have}.")
    return {epoch: recorded[epoch] for epoch in wanted}


class Images(NamedTuple):
    """The chosen images: their names, side in px -> (N, 3, H, W) uint8, and their foreground (N, S, S) bool."""

    names: list[str]
    views: dict[int, Tensor]
    foreground: np.ndarray
    source: str


def images_of(config: QuantifyConfig, networks: list[Examined], notes: list[str]) -> Images:
    """Draw the images, and read them at the size of every network."""
    records, root = _records(config)
    if config.masks != "central" and root is None:
        raise UserError(
            "masks are found by the names of image files; give the folder of the images too, as --images DIR."
        )
    count = min(config.count, len(records))
    rows = np.sort(np.random.default_rng(config.seed).choice(len(records), count, replace=False))
    chosen = records.select(rows, renumber=False)
    if config.skip_unreadable and chosen.paths is not None:
        loader = ImageLoader(chosen, Geometry(networks[0].size), skip_unreadable=True)
        if loader.skipped:
            notes.append(f"skipped {len(loader.skipped)} unreadable images, the first {loader.skipped[0]}")
        chosen = loader.records
    names = [f"image {row}" for row in rows]
    if chosen.paths is not None:
        names = [Path(path).relative_to(root).as_posix() if root else Path(path).name for path in chosen.paths]
    masks = _masks(config, names)
    if config.view == "crop" and len({network.size for network in networks}) > 1:
        raise UserError("the networks see images of different sizes, and so different crops; leave --view crop out.")
    views, sides = {}, {}
    for size in {network.size for network in networks}:
        geometry = Geometry(input_size=size, resize=size if config.view == "whole" else None, flip=False)
        loader = ImageLoader(chosen, geometry)
        views[size] = torch.cat([batch.images for batch in loader.test(64)])
        sides[size] = (geometry, loader.side)
    geometry, side = sides[networks[-1].size]
    foreground = np.stack([_foreground(masks, chosen, k, name, geometry, side, config) for k, name in enumerate(names)])
    notes += _without_a_side(foreground)
    return Images(names, views, foreground, config.images or f"training images of {records.name}")


def _without_a_side(foreground: np.ndarray) -> list[str]:
    """Images that cannot be compared with their own background; ``UserError`` where all are such."""
    share = foreground.mean((1, 2))
    alone = int(((share == 0) | (share == 1)).sum())
    if alone == len(share):
        raise UserError(
            "no image has both foreground and background on the grid; check --masks, or give a finer --grid."
        )
    if not alone:
        return []
    return [
        f"{alone} of {len(share)} images have no foreground, or no background, on the grid; they are never effective."
    ]


def _records(config: QuantifyConfig) -> tuple[ImageRecords, Path | None]:
    """All images to draw from, and the folder that their names begin at."""
    if config.images is not None:
        paths = images_in(config.images)
        labels = np.zeros(len(paths), dtype=np.int64)
        return ImageRecords("images", labels, ("images",), paths=tuple(paths)), Path(config.images)
    run = next((path for path in (config.distilled, config.baseline, config.teacher) if path is not None), None)
    assert run is not None
    stored = run_of(run).stored_config()
    if stored is not None and stored.get("unlabelled"):
        raise UserError(f"{run} was trained without labels; name its images, as in --images {stored['data']}.")
    if stored is None:
        raise UserError(f"{run} does not say which images it was trained on; give a folder of images, as --images DIR.")
    return load_splits(checked(parse("train", ["--mode", "eval", "--load", run])).config).train, None


def _masks(config: QuantifyConfig, names: list[str]) -> MaskFolder | Boxes | None:
    """The source of foregrounds, which must know every image; None for the central box."""
    if config.masks == "central":
        central_box(config.grid)
        return None
    source: MaskFolder | Boxes = Boxes(config.masks) if Path(config.masks).is_file() else MaskFolder(config.masks)
    missing = source.missing(names)
    if missing:
        raise UserError(
            f"--masks {config.masks} has nothing for {len(missing)} of the {len(names)} chosen images, the first "
            f"{missing[0]}; add them, or give --images a folder in which every image has a mask."
        )
    return source


def _foreground(
    masks: MaskFolder | Boxes | None,
    records: ImageRecords,
    row: int,
    name: str,
    geometry: Geometry,
    side: int,
    config: QuantifyConfig,
) -> np.ndarray:
    if masks is None:
        return central_box(config.grid)
    if isinstance(masks, MaskFolder):
        return segmentation_mask(masks.mask_for(name), geometry, config.grid, side)
    assert records.paths is not None
    _, height, width = decode(records.paths[row]).shape
    return box_mask(masks.box_for(name), (height, width), geometry, config.grid, side)
