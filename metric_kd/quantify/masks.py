"""Foreground of an image on a grid over the square that the network sees: central box, bounding box, segmentation."""

import csv
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

import numpy as np

from metric_kd.data.decode import EXTENSIONS
from metric_kd.data.pillow import open_image
from metric_kd.data.transforms import Geometry
from metric_kd.errors import UserError

MASK_SUFFIXES = EXTENSIONS | {".npy"}
COLUMNS = ("path", "x", "y", "width", "height")
CUB_BOXES, CUB_IMAGES = "bounding_boxes.txt", "images.txt"


class Box(NamedTuple):
    """px of the stored image: the left upper corner and the size."""

    x: float
    y: float
    width: float
    height: float


def central_box(grid: int, share: float = 1 / 6) -> np.ndarray:
    """The middle of the image, where the object of a crop 1.2 times as large as its box lies: (S, S) bool.

        rows and columns floor(S * share) .. floor(S * (1 - share)), both included

    as in the reference for images without segmentation: 2..13 of 16, which is 144 cells. The fractions are exact, so
    grids of 6, 12, 18 have one row more before the end than after the start (1..5 of 6), as the formula says. Where the
    margin is less than a cell (grids of 3 to 5) it is one cell on each side, since a metric needs some background.
    Raises ``UserError`` for grids below 3 and shares not between 0 and 0.5.
    """
    if grid < 3 or not 0 < share < 0.5:
        raise UserError(
            f"no central box of a grid of {grid} with margins of {share}; give 3 cells or more, and 0 to 0.5."
        )
    margin = Fraction(share).limit_denominator(10_000)  # the float 1/6 is not 1/6
    first, last = math.floor(grid * margin), math.floor(grid * (1 - margin))
    if first == 0:
        first, last = 1, grid - 2
    foreground = np.zeros((grid, grid), dtype=bool)
    foreground[first : last + 1, first : last + 1] = True
    return foreground


def resized_side(image_size: tuple[int, int], geometry: Geometry) -> int:
    """px of the square that an image (height, width) in memory is made, before the centre crop of the test view."""
    return geometry.crop if geometry.keeps(*image_size) else geometry.side


def box_mask(
    box: tuple[float, float, float, float],
    image_size: tuple[int, int],
    geometry: Geometry,
    grid: int,
    side: int | None = None,
) -> np.ndarray:
    """Cells whose centre lies in a bounding box, in the test view of the image: (S, S) bool.

    box: (x, y, width, height) px of the stored image, whose size is (height, width); left and upper edge are inside,
    right and lower are not. side: as for :func:`segmentation_mask`. A box smaller than a cell, or outside the crop, may
    have no cell at all. Raises ``UserError`` for a box that is empty or lies outside the image.
    """
    x, y, width, height = box
    rows, columns = image_size
    if not (width > 0 and height > 0 and x < columns and y < rows and x + width > 0 and y + height > 0):
        raise UserError(
            f"the box {tuple(box)} does not lie in an image {columns} px wide and {rows} px high; mend the box."
        )
    side = resized_side(image_size, geometry) if side is None else side
    down, right = (_centres(size, side, geometry.crop, grid) for size in image_size)
    return np.outer((y <= down) & (down < y + height), (x <= right) & (right < x + width))


def _centres(size: int, side: int, crop: int, grid: int) -> np.ndarray:
    """(S,) where the centres of the cells lie in the stored image, px."""
    offset = (side - crop) // 2
    # over one denominator: on an edge of a box, rounding must not decide
    return (2 * grid * offset + (2 * np.arange(grid) + 1) * crop) * size / (2 * grid * side)


def segmentation_mask(mask: np.ndarray, geometry: Geometry, grid: int, side: int | None = None) -> np.ndarray:
    """A segmentation in the test view of its image, at the centre of each cell: (S, S) bool, true where it is > 0.

    mask: (H, W), the segmentation of the stored image. It takes the way of the image (resized to a square, aspect not
    kept, then the centre crop), by nearest pixel, and from the pixels of the crop the cells take that at their centre.
    The reference does the same without the crop, at 224 px, up to which pixel of a cell is called the nearest.

    side: px of the square before the crop, as the loader made it; by default that of an image in memory of the mask's
    size (:func:`resized_side`). Give it where the mask's size is not the image's, or the images are read from files.
    Raises ``UserError`` where the mask is not (H, W).
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or 0 in mask.shape:
        raise UserError(f"a segmentation has the shape {mask.shape}; give (height, width).")
    side = resized_side(mask.shape, geometry) if side is None else side
    down, right = (_nearest(size, side, geometry.crop, grid) for size in mask.shape)
    return mask[np.ix_(down, right)] > 0


def _nearest(size: int, side: int, crop: int, grid: int) -> np.ndarray:
    """(S,) pixels of the stored mask: cell -> pixel of the crop -> of the square -> stored, each by its centre."""
    seen = (2 * np.arange(grid) + 1) * crop // (2 * grid) + (side - crop) // 2
    return (2 * seen + 1) * size // (2 * side)


def _relative(path: "str | PurePath") -> str:
    """A path below the folder of images, with slashes; ``UserError`` where it leads elsewhere."""
    pure = PurePosixPath(path.as_posix() if isinstance(path, PurePath) else path)
    if pure.is_absolute() or ".." in pure.parts or not pure.name:
        raise UserError(f"{str(path)!r} is not the path of an image below the folder of images; give a relative one.")
    return pure.as_posix()


class MaskFolder:
    """Segmentations in a folder that mirrors the folder of images: ``a/b.jpg`` has ``a/b.png``, or another suffix.

    Any image suffix, or .npy with an array. Found by the path relative to the images, of which only the last suffix is
    exchanged; the reference replaces every "jpg" in the whole path. Raises ``UserError`` where there is no such folder.
    """

    def __init__(self, folder: "str | Path"):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"the folder of masks {self.folder} does not exist; point --masks at one.")
        self._listings: dict[PurePosixPath, dict[str, list[str]]] = {}

    def missing(self, paths: "Iterable[str | PurePath]") -> list[str]:
        """Those of the images that have no mask; ``UserError`` where one has two."""
        return [path for path in map(_relative, paths) if self._find(path) is None]

    def mask_for(self, path: "str | PurePath") -> np.ndarray:
        """The mask of one image, by its relative path: (H, W) bool.

        Foreground is > 0, in any channel: of a palette image the index (the border of VOC, 255, is foreground), of CUB
        whatever any annotator marked. Transparency is not read. Raises ``UserError`` where there is none or two, or it
        cannot be read.
        """
        relative = _relative(path)
        file = self._find(relative)
        if file is None:
            place = self.folder / PurePosixPath(relative).with_suffix("")
            raise UserError(f"the image {relative} has no mask; looked for {place} with .png, .npy and image suffixes.")
        return _read_npy(file) if file.suffix.lower() == ".npy" else _read_image(file)

    def _find(self, relative: str) -> Path | None:
        image = PurePosixPath(relative)
        files = self._listing(image.parent).get(image.stem, [])
        if len(files) > 1:
            raise UserError(
                f"the image {relative} has two masks in {self.folder / image.parent}: {files[0]}, {files[1]}."
            )
        return self.folder / image.parent / files[0] if files else None

    def _listing(self, parent: PurePosixPath) -> dict[str, list[str]]:
        """Name without suffix -> files of one folder; it is read once, since images come folder by folder."""
        if parent not in self._listings:
            found: dict[str, list[str]] = {}
            folder = self.folder / parent
            for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in MASK_SUFFIXES:
                    found.setdefault(stem, []).append(name)
            self._listings[parent] = found
        return self._listings[parent]


def _read_npy(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read the mask {file} ({error}); store a (height, width) array of bool or uint8."
        ) from error
    return _foreground(array, file)


def _read_image(file: Path) -> np.ndarray:
    from PIL import ImageOps

    try:
        with open_image(str(file)) as image:
            upright = ImageOps.exif_transpose(image)  # the images are turned upright as well
            array = np.asarray(upright)
            bands = upright.getbands()
    except Exception as error:  # Pillow raises many types for broken files; each means that it cannot be read
        raise UserError(f"cannot read the mask {file} ({error}); repair it or store it as PNG.") from error
    if len(bands) > 1:  # an opaque picture of a mask would be foreground everywhere
        array = array[..., [k for k, band in enumerate(bands) if band not in ("A", "a")]]
    return _foreground(array, file)


def _foreground(array: np.ndarray, file: Path) -> np.ndarray:
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "buif":
        raise UserError(f"the mask {file} has the shape {array.shape} of {array.dtype}; store (height, width) numbers.")
    return np.any(array.reshape(*array.shape[:2], -1) > 0, axis=-1)


class Boxes:
    """One bounding box per image.

    file: CSV with the columns path (relative to the images), x, y, width, height in px; or ``bounding_boxes.txt`` ("id
    x y width height") with ``images.txt`` ("id path") beside it. Raises ``UserError`` that names the line: a column
    that is missing, what is not a number, a size that is not positive, a path that comes twice.
    """

    def __init__(self, file: "str | Path"):
        self.file = Path(file)
        self._boxes: dict[str, Box] = {}
        rows = _cub_rows(self.file) if self.file.name == CUB_BOXES else _csv_rows(self.file)
        for line, name, cells in rows:
            try:
                path = _relative(name)
            except UserError as error:
                raise UserError(f"{self.file}, line {line}: {error}") from error
            if path in self._boxes:
                raise UserError(f"{self.file}, line {line}: {path} has a box already; leave it one.")
            self._boxes[path] = _box(self.file, line, cells)
        if not self._boxes:
            raise UserError(f"{self.file} has no boxes; give it one line per image.")

    def missing(self, paths: "Iterable[str | PurePath]") -> list[str]:
        """Those of the images that have no box."""
        return [path for path in map(_relative, paths) if path not in self._boxes]

    def box_for(self, path: "str | PurePath") -> Box:
        """The box of one image, by its relative path; ``UserError`` where there is none."""
        relative = _relative(path)
        if relative not in self._boxes:
            raise UserError(f"the image {relative} has no box in {self.file}; add a line for it.")
        return self._boxes[relative]


def _box(file: Path, line: int, cells: "list[str]") -> Box:
    numbers = []
    for name, cell in zip(Box._fields, cells, strict=True):
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{file}, line {line}: {name} is {cell!r}; write a number of pixels.")
        numbers.append(number)
    box = Box(*numbers)
    if box.width <= 0 or box.height <= 0:
        raise UserError(f"{file}, line {line}: the box is {box.width:g} x {box.height:g} px; give it a positive size.")
    return box


def _csv_rows(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            reader.fieldnames = columns = [(c or "").strip() for c in reader.fieldnames or []]
            for needed in COLUMNS:
                if needed not in columns:
                    raise UserError(f"{file} has no column {needed!r} but {', '.join(columns) or 'nothing'}; add it.")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{file}, line {reader.line_num} has not {len(columns)} cells; quote commas.")
                yield reader.line_num, row["path"].strip(), [row[name].strip() for name in COLUMNS[1:]]
    except OSError as error:
        raise UserError(f"cannot read the boxes {file} ({error.strerror}); give a CSV file or {CUB_BOXES}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is no UTF-8 CSV file ({error}); save it as one.") from error


def _cub_rows(file: Path) -> Iterator[tuple[int, str, list[str]]]:
    names: dict[str, str] = {}
    for line, cells in _cub_lines(file.parent / CUB_IMAGES, 2):
        if cells[0] in names:
            raise UserError(f"{CUB_IMAGES}, line {line}: the number {cells[0]} comes twice; unpack CUB-200 again.")
        names[cells[0]] = cells[1]
    for line, cells in _cub_lines(file, 5):
        if cells[0] not in names:
            raise UserError(f"{file}, line {line}: {CUB_IMAGES} has no image {cells[0]!r}; unpack CUB-200 again.")
        yield line, names[cells[0]], cells[1:]


def _cub_lines(file: Path, cells: int) -> Iterator[tuple[int, list[str]]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {file} ({reason}); {CUB_BOXES} needs {CUB_IMAGES} beside it.") from error
    for number, line in enumerate(lines, start=1):
        parts = line.strip().split(None, cells - 1)
        if parts and len(parts) != cells:
            raise UserError(f"{file}, line {number} has {len(parts)} cells and not {cells}; unpack CUB-200 again.")
        if parts:
            yield number, parts
