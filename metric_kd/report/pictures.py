"""Pictures that live inside a page: data URIs of charts and photographs, with their text for who cannot see them."""

import base64
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = 64
"""Images up to this side (px) are kept as they are and enlarged with hard pixels."""
THUMBNAIL = 192
"""Longer side (px) of the copies of larger images."""


@dataclass(frozen=True)
class Picture:
    """source: a data URI; alt: what it shows, in words; caption: what to see in it; pixelated: enlarge hard."""

    source: str
    alt: str
    caption: str = ""
    pixelated: bool = False


def chart(figure: "Figure", alt: str, caption: str = "") -> Picture:
    """A matplotlib figure as a PNG, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the text beside the picture has it whole.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return Picture(_uri("png", buffer.getvalue()), alt, caption)


def photograph(image: np.ndarray, alt: str, side: int = THUMBNAIL) -> Picture:
    """An (H, W, 3) uint8 image: PNG where it is small, else a JPEG thumbnail whose longer side has ``side`` px."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3) uint8, not {image.shape} {image.dtype}.")
    small = max(image.shape[:2]) <= SMALL
    picture, buffer = Image.fromarray(np.ascontiguousarray(image)), io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.thumbnail((side, side))
        picture.save(buffer, "JPEG", quality=85)
    return Picture(_uri("png" if small else "jpeg", buffer.getvalue()), alt, pixelated=small)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
