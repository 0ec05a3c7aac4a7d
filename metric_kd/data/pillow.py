"""What Pillow opens to RGB uint8: safe formats only, of a size that memory holds, upright, deep pixels scaled."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image as Pillow

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
"""Raster formats that are told by their first bytes; none starts another program, as EPS does."""
DEEP = ("PPM", "PNG")
"""Formats whose images of mode I hold 0..65535, whatever their maxval."""
VEILED = {"La": "LA", "RGBa": "RGBA"}
SMALL = 1 << 24
"""Pixels that any memory holds."""
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274
XMP = {"xmp", "XML:com.adobe.xmp"}
XMP = {"xmp", "XML:com.adobe.xmp"}


class Refused(ValueError):
    """An image that is whole and still cannot be shown in 8 bits, or is too large."""


def open_image(file: str) -> "Pillow.Image":
    """The image of a file, its pixels still unread. Raises what Pillow raises, and ``Refused`` for too many pixels."""
    from PIL import Image

    try:
        return Image.open(file, formats=known())
    except Image.DecompressionBombError as error:
        raise Refused(_claim(file)) from error


@lru_cache
def known() -> tuple[str, ...]:
    """Those of ``FORMATS`` that the Pillow of this machine reads."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_size(width: int, height: int) -> None:
    """Raise ``Refused`` for more pixels than Pillow takes: a few bytes can claim any number."""
    if width * height < SMALL:
        return
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Refused(f"it claims {width} x {height} pixels")


def rgb(image: "Pillow.Image") -> np.ndarray:
    """(H, W, 3) uint8, upright by the EXIF entry; alpha is dropped, and deep pixels become 8 bits of their range.

    Raises what Pillow raises where the pixels are damaged, and ``Refused`` for a mode that has no known range.
    """
    check_size(*image.size)
    image.load()
    deep = _deep(image)
    if deep is not None:
        from PIL import Image

        grey = Image.fromarray(deep)
        return np.array(_turned(grey, image).convert("RGB"))
    if image.mode in VEILED:
        plain = image.convert(VEILED[image.mode])
        return np.array(_turned(plain, image).convert("RGB"))
    return np.array(_turned(image, image).convert("RGB"))


def narrow(array: np.ndarray) -> np.ndarray:
    """16 bits to 8: the upper ones."""
    return (array.astype(np.uint16) >> 8).astype(np.uint8)


def _deep(image: "Pillow.Image") -> np.ndarray | None:
    """(H, W) uint8 of an image with one channel of more than 8 bits; None for any other."""
    if image.mode.startswith("I;16"):
        values: np.ndarray = np.asarray(image).astype(np.uint16)
        tags: Any = getattr(image, "tag_v2", {})
        if tuple(tags.get(BITS, ())) == (12,):
            values = np.left_shift(values, 4)
        return narrow(np.invert(values) if tags.get(PHOTOMETRIC) == 0 else values)
    if image.mode == "I" and image.format in DEEP:
        return narrow(np.asarray(image))
    if image.mode in ("I", "F"):
        kind = "32-bit or signed whole" if image.mode == "I" else "floating"
        raise Refused(f"it holds {kind} numbers, mode {image.mode}, of no known range; store it with 8 or 16 bits")
    return None


def _turned(pixels: "Pillow.Image", image: "Pillow.Image") -> "Pillow.Image":
    """``pixels`` turned by the EXIF entry of ``image``; one that is damaged turns nothing."""
    from PIL import Image

    turn = Image.Transpose
    ways = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_270,
        7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    try:
        way = ways.get(_orientation(image))
    except Exception:  # Pillow raises many types for an entry that is no EXIF; the pixels are whole
        return pixels
    return pixels if way is None else pixels.transpose(way)


def _orientation(image: "Pillow.Image") -> int:
    """The EXIF entry, 1 where there is none. One that stands in XMP alone counts nowhere: the JPEG decoder leaves it too."""
    from PIL import Image

    if not XMP & image.info.keys():
        return image.getexif().get(ORIENTATION, 1)
    exif = Image.Exif()
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, getattr(image, "tag_v2", {}).get(ORIENTATION, 1))


def _claim(file: str) -> str:
    """What an image that Pillow refuses for its size says of it."""
    from PIL import Image

    try:
        with open(file, "rb") as stream:
            head = stream.read(16)
            for name in known():
                factory, accepts = Image.OPEN[name]
                if accepts is None or accepts(head) is True:
                    stream.seek(0)
                    width, height = factory(stream, "").size
                    return f"it claims {width} x {height} pixels"
    except Exception:  # some formats are refused before their size is known
        pass
    return "it claims too many pixels"
