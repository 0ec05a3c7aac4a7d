"""Entropy maps for a page: every image with its foreground, and what each network discards of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metric_kd.quantify.summary import EntropyMaps
from metric_kd.report.pictures import THUMBNAIL, Picture, chart, photograph

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

WIDTH, LETTERS = 5.2, 11
"""Inches of the colour bar and points of its letters."""
COLOURS, OPACITY = "viridis", 0.6
"""Colour map of the entropies, whose lightness alone can be read, and its share where it lies over the grey image."""
GREYS = (0.15, 0.85)
PERCENTILES = (2, 98)
"""Of all cells on the page: the ends of the colour range. The reference code fixes it at -4.5 and -2.3 nats."""


class Tile(NamedTuple):
    """A picture above the name of what it shows and what to read off it; None where a network has no map of the image."""

    name: str
    picture: Picture | None = None
    remarks: tuple[str, ...] = ()


def tiles(pictures: Sequence[EntropyMaps], networks: Sequence[str]) -> list[tuple[str, list[Tile]]]:
    """For every image: its name, the image with its foreground outlined, then the entropies of every network over it."""
    limits = colour_range(pictures, networks)
    rows = []
    for shown in pictures:
        photo = _enlarged(shown.image)
        row = [_image_tile(shown, photo)]
        for network in networks:
            row.append(_map_tile(shown, network, photo, limits) if network in shown.maps and limits else Tile(network))
        rows.append((shown.name, row))
    return rows


def colour_range(pictures: Sequence[EntropyMaps], networks: Sequence[str]) -> tuple[float, float] | None:
    """Nats of the first and the last colour: percentiles of all cells of all maps of the page, at least 0.1 apart."""
    maps = [shown.maps[network] for shown in pictures for network in networks if network in shown.maps]
    if not maps:
        return None
    low, high = np.percentile(np.concatenate([np.ravel(values) for values in maps]), PERCENTILES)
    middle, half = (low + high) / 2, max(high - low, 0.1) / 2
    return round(float(middle - half), 2), round(float(middle + half), 2)


def colour_bar(limits: tuple[float, float]) -> Picture:
    """The colours of the maps, as they look over a middle grey."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.95), layout="constrained")
    colours = ListedColormap(_mixed(_colours()(np.arange(256))[:, :3], 0.5))
    bar = figure.colorbar(
        ScalarMappable(Normalize(*limits), colours), cax=figure.add_subplot(), orientation="horizontal", extend="both"
    )
    bar.set_label("entropy of a cell (nats)", fontsize=LETTERS)
    bar.ax.tick_params(labelsize=LETTERS - 1)
    low, high = (f"{limit:.2f}" for limit in limits)
    alt = f"Colour bar of the maps: dark violet at {low} nats and below, through green, to yellow at {high} nats and above."
    return chart(figure, alt)


def _image_tile(shown: EntropyMaps, photo: np.ndarray) -> Tile:
    remark = f"foreground: {int(shown.foreground.sum())} of {shown.foreground.size} cells"
    alt = f"{shown.name}, the foreground outlined; {remark}."
    return Tile("image", photograph(_outlined(photo, shown.foreground), alt), (remark,))


def _map_tile(shown: EntropyMaps, network: str, photo: np.ndarray, limits: tuple[float, float]) -> Tile:
    (low, high), values = limits, shown.maps[network]
    colours = _colours()(np.clip((_spread(values, photo.shape) - low) / (high - low), 0, 1))[..., :3]
    painted = (255 * _mixed(colours, _grey(photo)[..., None])).round().astype(np.uint8)
    remarks = tuple(
        f"{name} {values[cells].mean():.2f} nats"
        for name, cells in (("foreground", shown.foreground), ("background", ~shown.foreground))
        if cells.any()
    )
    alt = (
        f"{shown.name}, {network}: entropies of the cells from {values.min():.2f} to {values.max():.2f} nats; "
        f"means: {', '.join(remarks)}."
    )
    return Tile(network, photograph(_outlined(painted, shown.foreground), alt), remarks)


def _colours() -> "Colormap":
    from matplotlib import colormaps

    return colormaps[COLOURS]


def _mixed(colours: np.ndarray, grey: np.ndarray | float) -> np.ndarray:
    return OPACITY * colours + (1 - OPACITY) * grey


def _enlarged(image: np.ndarray) -> np.ndarray:
    """The image as large as it is shown: a small one with hard pixels, a large one reduced."""
    from PIL import Image

    longer = max(image.shape[:2])
    if 2 * longer <= THUMBNAIL:
        return image.repeat(THUMBNAIL // longer, 0).repeat(THUMBNAIL // longer, 1)
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(picture)


def _grey(photo: np.ndarray) -> np.ndarray:
    """Lightness, stretched so that a dull image can be recognised, within GREYS so that it is not taken for entropy."""
    grey = photo @ np.array([0.299, 0.587, 0.114])
    low, high = np.percentile(grey, (1, 99))
    share = np.clip((grey - low) / (high - low), 0, 1) if high > low else np.full(grey.shape, 0.5)
    return GREYS[0] + (GREYS[1] - GREYS[0]) * share


def _spread(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A value for every pixel: that of its cell, as nearest upsampling does."""
    rows, columns = (np.arange(size) * len(cells) // size for size in shape[:2])
    return cells[rows][:, columns]


def _outlined(photo: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """The edge of the foreground: white inside, black outside, so that it is seen on every ground."""
    from scipy.ndimage import binary_dilation, binary_erosion

    inside, around = _spread(foreground, photo.shape), np.ones((3, 3), bool)
    drawn = photo.copy()
    drawn[inside & ~binary_erosion(inside, around, 2, border_value=1)] = 255
    drawn[~inside & binary_dilation(inside, around)] = 0
    return drawn
