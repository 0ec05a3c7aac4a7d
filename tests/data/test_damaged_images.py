"""No bytes end the process: a changed file is an image or is named in one sentence."""

import os
import subprocess
import sys

FORMATS = ("jpeg", "png", "webp", "gif", "tiff", "bmp", "avif", "ppm", "jp2", "qoi")
CHILD = '''
import io, os, random, sys, warnings
import numpy as np
from PIL import Image, features
from metric_kd.data.decode import check_header, decode, pixels_of
from metric_kd.errors import UserError

warnings.simplefilter("ignore")
path = sys.argv[1]
noise = np.random.default_rng(1).integers(0, 256, (6, 7, 4), dtype=np.uint8)
alpha = Image.fromarray(noise).resize((37, 25))
colour, grey = alpha.convert("RGB"), alpha.convert("L")
palette, deep = colour.convert("P"), Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
exif = Image.Exif()
exif[274] = 6

def png(depth, colours, channels):
    """Every colour type of 16 bits, and interlaced rows that Pillow does not write."""
    import struct, zlib
    def part(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", 9, 7, depth, colours, 0, 0, int(depth == 8))
    # Adam7 of 9 x 7: (width, height) of its seven passes
    sizes = ((2, 1), (1, 1), (3, 1), (2, 2), (5, 2), (4, 4), (9, 3)) if depth == 8 else ((9, 7),)
    rows = b"".join((b"\\1" + bytes(range(w * channels * depth // 8))) * h for w, h in sizes)
    parts = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return b"\\x89PNG\\r\\n\\x1a\\n" + parts

def save(image, name, **options):
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()

SEEDS = {
    "jpeg": lambda: [save(colour, "JPEG", exif=exif), save(colour, "JPEG", progressive=True), save(grey, "JPEG"),
                     save(colour.convert("CMYK"), "JPEG")],
    "png": lambda: [*(save(i, "PNG") for i in (colour, alpha, grey, alpha.convert("LA"), palette, deep, grey.convert("1"))),
                    save(palette, "PNG", bits=2), save(palette, "PNG", bits=4, exif=exif),
                    *(png(depth, c, n) for depth in (8, 16) for c, n in ((0, 1), (2, 3), (4, 2), (6, 4)))],
    "webp": lambda: [save(colour, "WEBP"), save(alpha, "WEBP", lossless=True, exif=exif)],
    "gif": lambda: [save(palette, "GIF"), save(palette, "GIF", save_all=True, append_images=[palette.rotate(90)])],
    "tiff": lambda: [*(save(colour, "TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
                     save(deep, "TIFF"), save(grey.convert("1"), "TIFF", compression="group4"), save(palette, "TIFF")],
    "bmp": lambda: [save(i, "BMP") for i in (colour, palette, grey, grey.convert("1"), alpha)],
    "avif": lambda: [save(colour, "AVIF"), save(alpha, "AVIF")] if features.check("avif") else [],
    "ppm": lambda: [save(colour, "PPM"), save(grey, "PPM"), save(grey.convert("1"), "PPM"), b"P5 3 2 65535\\n" + bytes(12),
                    b"P2 3 2 4095\\n1 2 3 4 5 4095", b"P3 1 2 255\\n1 2 3 4 5 6"],
    "jp2": lambda: [save(colour, "JPEG2000"), save(alpha, "JPEG2000")] if features.check("jpg_2000") else [],
    "qoi": lambda: [save(i, "QOI") for i in (colour, alpha)] if "QOI" in Image.SAVE else [],
}
def attempt(kind):
    seeds, draw = SEEDS[kind](), random.Random(kind)
    for k in range(len(seeds) + 200 if seeds else 0):
        data = bytearray(seeds[k % len(seeds)])
        place = draw.randrange(len(data))
        if k >= len(seeds):
            way = draw.randrange(4)
            if way == 0:
                data = data[:place]
            elif way == 1:
                data[place] ^= draw.randrange(1, 256)
            elif way == 2:
                data[draw.randrange(min(120, len(data)))] = draw.choice((0, 127, 128, 255))
            else:
                data[place : place + draw.randrange(40)] = draw.randbytes(draw.randrange(40))
        with open(path, "wb") as file:
            file.write(data)
        for function in (decode, check_header):
            try:
                pixels = function(path)
                assert function is check_header or pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.element_size() == 1
            except UserError as error:
                assert k >= len(seeds), error
                assert str(error).startswith(f"cannot read the image {path} (") and "\\n" not in str(error), error
        try:
            opened = Image.open(path)
        except Exception:
            continue
        try:
            pixels_of(opened)
        except UserError as error:
            assert str(error).startswith("cannot read the image ") and "\\n" not in str(error), error

Image.init()
for kind in SEEDS:
    child = os.fork()  # torch is imported once; the end of one format is not that of the others
    if not child:
        try:
            attempt(kind)
        except BaseException as error:
            print(kind, type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    print(kind, os.waitpid(child, 0)[1], flush=True)
'''


def test_two_hundred_changed_files_of_every_format(tmp_path):
    command = [sys.executable, "-X", "faulthandler", "-c", CHILD, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.split("\n")[:-1] == [f"{kind} 0" for kind in FORMATS], done.stdout + done.stderr[-2000:]
    assert done.returncode == 0
