"""What `metric-kd quantify` looks at: networks at their recorded epochs, images as each sees them, their foregrounds."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metric_kd.cli.config import QuantifyConfig
from metric_kd.cli.goals import load_splits
from metric_kd.cli.parse import parse
from metric_kd.cli.plugins import load_plugins
from metric_kd.cli.session import checked
from metric_kd.cli.stored import run_of
from metric_kd.data.decode import decode
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry
from metric_kd.deploy.embedder import images_in
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint, restore_network
from metric_kd.engine.weight_record import checkpoints_of, read_distances
from metric_kd.errors import UserError
from metric_kd.models.layers import find_layer, weight_of
from metric_kd.models.network import Network, NetworkSpec
from metric_kd.quantify.concepts import cumulative_distance
from metric_kd.quantify.masks import Boxes, MaskFolder, box_mask, central_box, segmentation_mask

NETWORKS = ("teacher", "distilled", "baseline")


class Looked(NamedTuple):
    """One of the networks: epoch -> checkpoint, the layer, whether to look behind a ReLU, the side of its images in px,
    and how far the layer's weights had moved after each epoch (None without a record)."""

    name: str
    checkpoints: dict[int, Path]
    layer: str
    relu: bool
    size: int
    distance: np.ndarray | None


def load_network(path: Path) -> Network:
    """The network of a checkpoint of ours; ``UserError`` for a plain state dict, which does not say what it is."""
    content = read_checkpoint(path)
    if "network" not in content:
        raise UserError(
            f"{path} is a plain state dict, which does not say what network it belongs to; give a run of this program."
        )
    return restore_network(path, NetworkSpec.from_dict(content["network"]), {})


def networks_of(config: QuantifyConfig, notes: list[str]) -> list[Looked]:
    """The networks that the flags name, each opened once: what cannot be looked at is refused here."""
    found = []
    for name in NETWORKS:
        path = getattr(config, name)
        if path is None:
            continue
        run = run_of(path)
        load_plugins((run.stored_config() or {}).get("plugins", []))
        final = find_checkpoint(path, name)
        recorded = {} if name == "teacher" or not Path(path).is_dir() else checkpoints_of(run.weights)
        if config.epochs is not None and recorded:
            recorded = _asked(recorded, config.epochs, name)
        if not recorded:
            recorded = {int(read_checkpoint(final).get("metrics", {}).get("epoch", 0)): final}
            if name != "teacher":
                notes.append(
                    f"{name}: no weights were recorded while it was trained (--record_weights), so only its last network is "
                    "looked at, and when and how stably it learned is not known."
                )
        network = load_network(next(reversed(recorded.values())))
        layer = config.teacher_layer or config.layer if name == "teacher" else config.layer
        read = find_layer(network, layer)
        distance = None
        if len(recorded) > 1:
            moved = read_distances(run.weights)[weight_of(network, layer)]
            per_epoch = moved.path if config.distance == "step" else moved.chord
            distance = cumulative_distance(np.array(per_epoch), moved.start)
        relu = config.relu == "true" or (config.relu == "auto" and read.field != "embedding")
        assert network.spec.input_size is not None
        found.append(Looked(name, recorded, layer, relu, network.spec.input_size, distance))
    if not found:
        raise UserError("there is no network to look at; give --distilled RUN and --baseline RUN, and --teacher RUN.")
    return found


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


def images_of(config: QuantifyConfig, networks: list[Looked], notes: list[str]) -> Images:
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
        notes += (
            [f"skipped {len(loader.skipped)} unreadable images, the first {loader.skipped[0]}"]
            if loader.skipped
            else []
        )
        chosen = loader.records
    names = [f"image {row}" for row in rows]
    if chosen.paths is not None:
        names = [Path(path).relative_to(root).as_posix() if root else Path(path).name for path in chosen.paths]
    masks = _masks(config, names)
    views, sides = {}, {}
    for size in {network.size for network in networks}:
        geometry = Geometry(input_size=size, resize=size if config.view == "whole" else None, flip=False)
        loader = ImageLoader(chosen, geometry)
        views[size] = torch.cat([batch.images for batch in loader.test(64)])
        sides[size] = (geometry, loader.side)
    geometry, side = sides[networks[-1].size]
    foreground = np.stack([_foreground(masks, chosen, k, name, geometry, side, config) for k, name in enumerate(names)])
    return Images(names, views, foreground, config.images or f"training images of {records.name}")


def _records(config: QuantifyConfig) -> tuple[ImageRecords, Path | None]:
    """All images to draw from, and the folder that their names begin at."""
    if config.images is not None:
        paths = images_in(config.images)
        labels = np.zeros(len(paths), dtype=np.int64)
        return ImageRecords("images", labels, ("images",), paths=tuple(paths)), Path(config.images)
    run = next((path for path in (config.distilled, config.baseline, config.teacher) if path is not None), None)
    assert run is not None
    if run_of(run).stored_config() is None:
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
