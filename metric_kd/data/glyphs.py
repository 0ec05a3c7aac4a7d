"""glyphs: the embedded data set, characters drawn with the fonts that matplotlib carries; nothing is downloaded.

A class is a character across fonts. Which characters, and which of them are one class, is decided in three steps:

1. Candidates are letters of five scripts and some symbols that at least ``MIN_FONTS`` of ``FONTS`` draw. Characters that
   are a base letter plus a mark (a decomposition, or WITH in their Unicode name) are left out.
2. ``LOOK_ALIKES`` merges by hand what a person cannot tell apart once the size is gone: O and 0, l and I, case pairs,
   homoglyphs across scripts, and shapes that only some fonts share (a and alpha in italics).
3. Whatever else correlates above ``SAME`` in one of ``REFERENCE`` fonts, scaled to its ink box, is merged too. Merging
   is transitive.

Every image has its own font, stroke width, affine and elastic distortion, colours, background, covered patch and noise.
Nothing is mirrored or turned far, because b and d, or 6 and 9, are different classes. The ink is always darker than the
paper. The strengths are a compromise: a first version with both polarities, clutter and twice the distortion taught a
triplet loss nothing in 300 steps, so they were lowered until the demo's teacher could pass 75% on the test classes.
"""

import functools
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metric_kd.data.parts import split_whole
from metric_kd.data.records import DATASETS, ImageRecords, Splits, Task
from metric_kd.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
"""Fonts whose character map means what Unicode says. Display, size-variant, LastResort and cmsy-like fonts do not."""
TEX_FONTS = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")
"""Computer Modern: its map is Unicode's for ASCII letters and digits only, so these draw nothing else."""
REFERENCE = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
MIN_FONTS = 8
SAME = 0.96
BLOCKS = (
    *((0x30, 0x7A), (0xC0, 0x1BF), (0x1C4, 0x2AF), (0x370, 0x3FF), (0x400, 0x52F)),
    *((0x531, 0x586), (0x10D0, 0x10FA), (0x20A0, 0x20BF)),
)
"""Latin and IPA, Greek, Cyrillic; Armenian, Georgian, currency."""
SYMBOLS = "#$%&*+<=>?@|~¢£¤¥§©¬®°±¶¿×÷∀∂∃∇√∞∫∮≈≠≡⊕⊗←↑→↓↔↕⇒⇔♀♂♠♣♥♦♪♫☺☼"
LOOK_ALIKES = (
    # One shape in several scripts, in both cases where the lower case is a small copy of the upper.
    "0OoΟοОоՕօ° 1Il|ıɪΙІӀӏ iі jјϳȷJЈյ aаɑα AΑА BΒВвʙ ßβ CcСс DÐƉ EΕЕ eе FϜ gɡց Gɢ HΗНнʜ hһհҺ kKΚκКкĸ LԼʟ MΜМмϺϻʍ "
    "NΝɴ nոռՈՌ ηŋŊ PpΡρРрƿǷ qԛ QԚ RʀƦ SsЅѕƽ TΤТтτ UuՍսʉɄυ VvνѴѵ WwԜԝ XxΧχХх× YyУуΥγҮүʏ ZzΖ 3ЗзɜƷʒӠӡ 5Ƽ 6б ÆӔ "
    "æӕ Œɶ ÞþϷϸ ƏəәӘǝ ƆɔϽͻ εɛԑƐԐ Єє ƩΣ ωɷ ΦφФфɸՓ Ψψ ΓГг ΠПпπ ΛɅʌ θΘɵѲѳӨөʘ ιɩƖ ςϛϚ ɥЧч ШшƜɯա £₤ ¢₵₡ Ɂɂʔ Ɣɣɤ "
    "Ǝ∃ ₱₽ Ʊʊ "
    # Case pairs of one script.
    "Дд Жж Ии Лл Цц Щщ Ъъ Ыы bЬьƄƅ Ээ Юю Яя Љљ Њњ Џџ Ћћђ Ѣѣ Ѫѫ Ҥҥ Ӌӌ Ƨƨ Ƹƹ Ȝȝ Ȣȣ Ƣƣ Ƕƕ Ϙϙ Ϡϡ Ͼͼ Ͽͽ Էէ Գգզ Ժժ Եե ՅՑ դղ"
).split()
ORDER_SEED = 20190618
"""Shuffles the classes once, the same for every ``seed``, so that both sides of the split mix all scripts."""
STROKE, HOLLOW = 3, 0.5
"""Widest stroke along the outline, in pixels of CANVAS, before the ink is scaled to INK; share left hollow by it."""
TURN, SHEAR, SCALE, SQUEEZE, SHIFT, BEND = 8.0, 0.15, (0.9, 1.1), 0.1, 0.16, 0.015
"""Degrees; then, where the image reaches from -1 to 1: slant, size, log of width over size, place, local bending."""
PAPER, CONTRAST, TINT, SHADE, TEXTURE, NOISE = (0.7, 1.0), (0.5, 0.8), 0.05, 0.05, 0.06, 0.08
"""Brightness and its changes, in 0 .. 1."""
HIDE = 0.05
"""Largest half side of the patch that covers a part of the image, as a share of the image."""
INK = 44
"""Pixels of the longer side of the ink."""
CANVAS = 64
"""Pixels of the square on which a character is drawn, before it is distorted."""


@functools.lru_cache(maxsize=1)
def _fonts() -> "dict[str, tuple[FreeTypeFont, frozenset[int]]]":
    """{font name: (font at CANVAS px, code points that it may draw)}."""
    try:
        import matplotlib
        from fontTools.ttLib import TTFont
        from PIL import ImageFont
    except ImportError as error:
        raise UserError(
            f"the dataset glyphs draws with matplotlib's fonts; pip install matplotlib ({error})."
        ) from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {}
    for name in (*FONTS, *TEX_FONTS):
        file = folder / f"{name}.ttf"
        if not file.is_file():
            raise UserError(f"matplotlib at {folder.parent} lacks the font {file.name}; reinstall matplotlib.")
        with TTFont(file, lazy=True) as table:
            drawn = {code for code, glyph in table.getBestCmap().items() if glyph != ".notdef"}
        if name in TEX_FONTS:
            drawn = {code for code in drawn if code < 128 and chr(code).isalnum()}
        if name.startswith(("DejaVuSerif", "STIX")) and "Ita" in name:
            # Cyrillic italics are other shapes: te looks like m, pe like n.
            drawn = {code for code in drawn if not 0x400 <= code < 0x530}
        fonts[name] = (ImageFont.truetype(str(file), CANVAS, layout_engine=ImageFont.Layout.BASIC), frozenset(drawn))
    return fonts


def _ink(font: "FreeTypeFont", character: str, stroke: int = 0, filled: bool = True) -> Any:
    """The character as a grey PIL image cut to its ink, or None where nothing is drawn.

    A stroke of some width is drawn along the outline, inwards and outwards; unless ``filled``, it is all that is drawn.
    """
    from PIL import Image

    def drawn(width: int) -> tuple[Any, tuple[int, int]]:
        mask, offset = font.getmask2(character, "L", stroke_width=width)
        return Image.frombytes("L", mask.size, bytes(mask)), offset

    image, (left, top) = drawn(stroke)
    if stroke and filled:
        inside, (x, y) = drawn(0)
        image.paste(255, (round(x - left), round(y - top)), inside)
    box = image.getbbox()
    return image.crop(box) if box else None


def _candidates() -> list[str]:
    """Characters that enough fonts draw, in the order of their code points."""
    fonts = _fonts()
    codes = {code for first, last in BLOCKS for code in range(first, last + 1)} | {ord(c) for c in SYMBOLS}
    kept = []
    for code in sorted(codes):
        character = chr(code)
        if character not in SYMBOLS and (
            unicodedata.category(character) not in ("Lu", "Ll", "Lo", "Nd", "Sc")
            or unicodedata.decomposition(character)
            or " WITH " in unicodedata.name(character, "")
        ):
            continue
        known = [font for name, (font, drawn) in fonts.items() if name in FONTS and code in drawn]
        if len(known) >= MIN_FONTS and all(_ink(font, character) for font in known):
            kept.append(character)
    return kept


def _alike(characters: list[str], side: int = 24) -> list[tuple[str, str]]:
    """Pairs whose ink, scaled to one box, correlates above SAME in a reference font and has nearly one aspect ratio."""
    from PIL import Image

    pairs = []
    for name in REFERENCE:
        font, drawn = _fonts()[name]
        known = [c for c in characters if ord(c) in drawn]
        inks = [_ink(font, c) for c in known]
        boxes = np.stack([np.asarray(i.resize((side, side), Image.Resampling.BOX), np.float32).ravel() for i in inks])
        boxes -= boxes.mean(1, keepdims=True)
        boxes /= np.linalg.norm(boxes, axis=1, keepdims=True) + 1e-6
        aspect = np.log([i.width / i.height for i in inks])
        same = (boxes @ boxes.T > SAME) & (np.abs(aspect[:, None] - aspect) < np.log(1.5))
        pairs += [(known[i], known[j]) for i, j in zip(*np.nonzero(np.triu(same, 1)), strict=True)]
    return pairs


@functools.lru_cache(maxsize=1)
def glyph_classes() -> tuple[str, ...]:
    """The classes, each a string of the characters that it holds, first the one that names it; in split order."""
    characters = _candidates()
    root = {c: c for c in characters}

    def find(c: str) -> str:
        while root[c] != c:
            c = root[c]
        return c

    pairs = [(group[0], c) for group in LOOK_ALIKES for c in group[1:]] + _alike(characters)
    for a, b in pairs:
        if a in root and b in root:
            first, second = sorted((find(a), find(b)))
            root[second] = first
    groups: dict[str, str] = {}
    for c in characters:
        groups[find(c)] = groups.get(find(c), "") + c
    ordered = [groups[c] for c in sorted(groups)]
    return tuple(ordered[i] for i in np.random.default_rng(ORDER_SEED).permutation(len(ordered)))


def _masks(characters: str, count: int, draw: np.random.Generator) -> np.ndarray:
    """(count, CANVAS, CANVAS) uint8: ink of one size, each from another (character, font) pair while they last."""
    from PIL import Image

    pairs = [(c, name) for c in characters for name, (_, drawn) in _fonts().items() if ord(c) in drawn]
    order = np.concatenate([draw.permutation(len(pairs)) for _ in range(-(-count // len(pairs)))])[:count]
    strokes, filled = draw.integers(0, STROKE + 1, count), draw.random(count) >= HOLLOW
    masks = np.zeros((count, CANVAS, CANVAS), np.uint8)
    for mask, pick, stroke, fill in zip(masks, order, strokes, filled, strict=True):
        ink = _ink(_fonts()[pairs[pick][1]][0], pairs[pick][0], int(stroke), bool(fill))
        scale = INK / max(ink.size)
        width, height = (max(2, round(side * scale)) for side in ink.size)
        ink = ink.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (CANVAS - width) // 2, (CANVAS - height) // 2
        mask[top : top + height, left : left + width] = np.asarray(ink)
    return masks


def _smooth(draw: np.random.Generator, count: int, channels: int, knots: int, size: int) -> Tensor:
    """(count, channels, size, size) smooth noise: normal at knots x knots, bicubic between."""
    coarse = torch.from_numpy(draw.standard_normal((count, channels, knots, knots)).astype(np.float32))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)


def _distort(masks: Tensor, draw: np.random.Generator, size: int) -> Tensor:
    """(N, CANVAS, CANVAS) in 0..1 to (N, 1, size, size): rotation, shear, scale, shift and a smooth bending."""
    count = len(masks)
    turn = np.deg2rad(draw.uniform(-TURN, TURN, count))
    shear = draw.uniform(-SHEAR, SHEAR, count)
    grow = np.exp(draw.uniform(np.log(SCALE[0]), np.log(SCALE[1]), count))
    squeeze = np.exp(draw.uniform(-SQUEEZE, SQUEEZE, count))
    rotate = np.stack([np.cos(turn), -np.sin(turn), np.sin(turn), np.cos(turn)], -1).reshape(count, 2, 2)
    slant = np.stack([squeeze, shear, np.zeros(count), 1 / squeeze], -1).reshape(count, 2, 2)
    matrix = rotate @ slant / grow[:, None, None]  # of the output's points in the input
    shift = draw.uniform(-SHIFT, SHIFT, (count, 2, 1))
    theta = torch.from_numpy(np.concatenate([matrix, matrix @ shift], -1).astype(np.float32))
    grid = F.affine_grid(theta, [count, 1, 2 * size, 2 * size], align_corners=False)
    grid = grid + BEND * _smooth(draw, count, 2, 4, 2 * size).permute(0, 2, 3, 1)
    return F.avg_pool2d(F.grid_sample(masks[:, None], grid, align_corners=False), 2)


def _hide(draw: np.random.Generator, count: int, size: int) -> Tensor:
    """(count, 1, size, size) bool: one rectangle of each image that is covered."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    middle, half = draw.uniform(0.2, 0.8, (2, count, 1, 1)), draw.uniform(0.03, HIDE, (2, count, 1, 1))
    inside = (np.abs(y - middle[0]) < half[0]) & (np.abs(x - middle[1]) < half[1])
    return torch.from_numpy(inside[:, None])


def _images(characters: str, count: int, size: int, seed: int) -> np.ndarray:
    """(count, size, size, 3) uint8, a function of the arguments alone."""
    draw = np.random.default_rng([seed, ord(characters[0])])
    masks = torch.from_numpy(_masks(characters, count, draw).astype(np.float32) / 255)
    ink = _distort(masks, draw, size)

    def column(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.from_numpy(draw.uniform(low, high, (count, channels, 1, 1)).astype(np.float32))

    paper, contrast = column(*PAPER), column(*CONTRAST)
    pen = paper - contrast
    paper = paper + column(-TINT, TINT, 3)
    pen = pen + column(-TINT, TINT, 3) + SHADE * _smooth(draw, count, 1, 3, size)
    paper = paper + column(0, TEXTURE) * _smooth(draw, count, 1, 6, size)
    image = paper + (pen - paper) * ink
    image = torch.where(_hide(draw, count, size), column(0.0, 1.0, 3), image)
    noise = torch.from_numpy(draw.standard_normal(image.shape).astype(np.float32))
    image = image + column(0, NOISE) * noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@DATASETS.register("glyphs")
def glyphs(
    root: "str | Path | None" = None,
    *,
    train_classes: "int | list[str] | None" = None,
    task: Task = "embedding",
    seed: int = 0,
    per_class: int = 24,
    size: int = 32,
    classes: int | None = None,
) -> Splits:
    """Characters across fonts, ``per_class`` images of each, drawn anew from ``seed``; ``root`` is not used.

    pixels: (classes * per_class, size, size, 3) uint8, sorted by class. A class is named for its first character, as in
    "U+0041 A". ``classes`` keeps only that many, the first; an image does not depend on which other classes are kept.
    For a classifier one in five images of each class tests.
    Equal arguments give equal pixels on the same versions of Pillow and matplotlib.
    Raises ``UserError`` where an option is out of range or matplotlib's fonts are missing.
    """
    if per_class < 2 or size < 8 or (classes is not None and classes < 2):
        raise UserError("glyphs needs per_class >= 2, size >= 8 and classes >= 2; raise the option that is smaller.")
    chosen = glyph_classes()
    if classes is not None and classes > len(chosen):
        raise UserError(f"glyphs has {len(chosen)} classes and {classes} are asked for; give a smaller number.")
    chosen = chosen[:classes]
    pixels = np.concatenate([_images(characters, per_class, size, seed) for characters in chosen])
    records = ImageRecords(
        name="glyphs",
        labels=np.repeat(np.arange(len(chosen), dtype=np.int64), per_class),
        class_names=tuple(f"U+{ord(characters[0]):04X} {characters[0]}" for characters in chosen),
        pixels=pixels,
        flip=False,
        mean=(0.75, 0.75, 0.75),
        std=(0.23, 0.23, 0.23),
    )
    return split_whole(records, train_classes, task)
