"""One photo gives one set of pixels: as a file, as a PIL image, as an array; deep pixels keep their range."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from metric_kd.data import decode
from metric_kd.errors import UserError

RAMP = np.arange(65536, dtype=np.uint16)[::37].reshape(-1, 4)[:440].reshape(40, 44)


def rows(image):
    """(H, W, 3) of what decode or pixels_of gave."""
    return image.permute(1, 2, 0).numpy()


def png(path, values, colours):
    """A PNG of 16 bits in any colour type: (H, W, C) uint16."""

    def part(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colours, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    parts = part(b"IHDR", head) + part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(("colours", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_sixteen_bits_keeps_the_upper_eight(tmp_path, colours, channels):
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, channels), dtype=np.uint16)
    png(tmp_path / "a.png", values, colours)
    upper = (values >> 8).astype(np.uint8)
    expected = np.repeat(upper[..., :1], 3, axis=2) if channels < 3 else upper[..., :3]
    np.testing.assert_array_equal(rows(decode.decode(str(tmp_path / "a.png"))), expected)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(rows(decode.pixels_of(image)), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_an_ordinary_png_is_as_torchvision_reads_it(tmp_path, mode):
    """Packs and caches that were made by torchvision stay true."""
    from torchvision.io import ImageReadMode, decode_image

    noise = np.random.default_rng(0).integers(0, 256, (31, 23, 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.png")
    data = torch.from_numpy(np.fromfile(tmp_path / "a.png", np.uint8))
    assert torch.equal(decode.decode(str(tmp_path / "a.png")), decode_image(data, ImageReadMode.RGB))


def deep_files(folder):
    text = " ".join(map(str, RAMP.ravel().tolist()))
    (folder / "plain.pgm").write_text(f"P2\n44 40\n65535\n{text}\n")
    (folder / "binary.pgm").write_bytes(b"P5\n44 40\n65535\n" + RAMP.astype(">u2").tobytes())
    (folder / "twelve.pgm").write_bytes(b"P5\n44 40\n4095\n" + (RAMP >> 4).astype(">u2").tobytes())
    (folder / "ten.pnm").write_bytes(b"P5\n44 40\n1023\n" + (RAMP >> 6).astype(">u2").tobytes())
    Image.fromarray(RAMP).save(folder / "a.tif")
    Image.frombytes("I;16B", (44, 40), RAMP.astype(">u2").tobytes()).save(folder / "big.tif")
    white = Image.fromarray(~RAMP)
    white.save(folder / "white.tif", tiffinfo={262: 0})
    Image.fromarray(RAMP).save(folder / "a.png")
    return sorted(p for p in folder.iterdir())


def test_deep_grey_keeps_its_range_in_every_format(tmp_path):
    right = (RAMP >> 8).astype(int)
    for path in deep_files(tmp_path):
        with Image.open(path) as image:
            for pixels in (decode.decode(str(path)), decode.pixels_of(image)):
                difference = abs(rows(pixels).astype(int) - right[..., None])
                assert difference.max() <= (path.name in ("twelve.pgm", "ten.pnm")), path.name


def test_numbers_of_no_known_range_are_refused_by_name(tmp_path):
    signed = {
        "s16.tif": Image.fromarray(RAMP.astype(np.int32)),
        "f.tif": Image.fromarray(RAMP.astype(np.float32) / 65535),
    }
    for name, image in signed.items():
        image.save(tmp_path / name)
        opened = Image.open(tmp_path / name)
        for given in (str(tmp_path / name), opened, image):
            with pytest.raises(
                UserError, match=r"cannot read the image .*mode [IF], of no known range; store it with 8"
            ):
                decode.pixels_of(given)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBX", "La", "RGBa"]
)
def test_a_pil_image_of_any_mode_is_shown(mode):
    base = Image.new("RGBA", (5, 4), (200, 100, 50, 255))
    through = {"La": "LA", "PA": "P", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "RGBX": "RGB"}.get(mode)
    image = (base.convert(through) if through else base).convert(mode)
    right = base.convert("RGB") if mode in ("RGB", "CMYK", "YCbCr", "HSV", "RGBA", "RGBX", "RGBa") else None
    pixels = rows(decode.pixels_of(image))
    assert pixels.shape == (4, 5, 3) and pixels.dtype == np.uint8
    if right is not None:
        assert abs(pixels.astype(int) - np.asarray(right).astype(int)).max() <= 3


def test_lab_has_its_colours(tmp_path):
    """Pillow either converts it or says that it cannot; nothing else comes of it."""
    lab = Image.new("LAB", (3, 3), (138, 166, 174))  # of (200, 100, 50)
    lab.save(tmp_path / "a.tif")
    for given in (lab, str(tmp_path / "a.tif")):
        try:
            pixels = decode.pixels_of(given)
        except UserError as error:
            assert "cannot read the image" in str(error) and "LAB" in str(error)
        else:
            assert abs(rows(pixels).astype(int) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_a_photo_is_turned_however_it_is_given(tmp_path, name, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 95} if name == "a.jpg" else {}
    Image.fromarray(noise).resize((40, 24)).save(tmp_path / name, exif=exif, **options)
    from_file = rows(decode.decode(str(tmp_path / name))).astype(int)
    with Image.open(tmp_path / name) as image:
        given = rows(decode.pixels_of(image)).astype(int)
    assert from_file.shape == given.shape == ((24, 40, 3) if orientation < 5 else (40, 24, 3))
    assert abs(from_file - given).max() <= 1
    np.testing.assert_array_equal(rows(decode.pixels_of(from_file.astype(np.uint8))), from_file)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff"])
@pytest.mark.parametrize("entry", [None, 8])
def test_an_orientation_in_xmp_alone_turns_nothing(name, entry, tmp_path):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if name == "x.png":
        options = {"pnginfo": PngImagePlugin.PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    else:
        options = {"tiffinfo": {700: xmp}} if name == "x.tiff" else {"xmp": xmp}
    if entry and name == "x.tiff":
        options["tiffinfo"][274] = entry
    elif entry:
        options["exif"] = Image.Exif()
        options["exif"][274] = entry
    noise = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 24)).save(tmp_path / name, **options)
    image = Image.open(tmp_path / name)
    assert image.getexif()[274] == (entry or 6), "Pillow reads it"
    file = decode.decode(str(tmp_path / name))
    turned = entry or name == "x.tiff"  # which Pillow itself turns while it loads
    assert file.shape == ((3, 40, 24) if turned else (3, 24, 40))
    assert torch.equal(decode.pixels_of(Image.open(tmp_path / name)), file)


def test_an_exif_entry_that_is_damaged_turns_nothing(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp"):
        Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / name, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
        with Image.open(tmp_path / name) as image:
            assert decode.pixels_of(image).shape == decode.decode(str(tmp_path / name)).shape == (3, 4, 8)


def test_arrays_of_grey_alpha_and_sixteen_bits():
    noise = np.random.default_rng(0).integers(0, 65536, (5, 6, 4), dtype=np.uint16)
    upper = (noise >> 8).astype(np.uint8)
    for given, right in (
        (upper[..., :3], upper[..., :3]), (upper, upper[..., :3]), (noise, upper[..., :3]),
        (upper[..., 0], np.repeat(upper[..., :1], 3, axis=2)), (upper[..., :1], np.repeat(upper[..., :1], 3, axis=2)),
        (noise.astype(">u2")[..., 0], np.repeat(upper[..., :1], 3, axis=2)),
    ):  # fmt: skip
        np.testing.assert_array_equal(rows(decode.pixels_of(given)), right)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"\(3, 8, 9\) with the channels first; give array.transpose\(1, 2, 0\)"),
        (np.zeros((8, 9, 3), np.float32), "uint8 .*got float32; scale it"),
        (np.zeros((8, 9, 3), np.int64), "got int64"),
        (np.zeros((8, 9, 3), bool), "got bool"),
        (np.zeros((8, 9, 5), np.uint8), r"shape \(H, W, 3\), got \(8, 9, 5\)"),
        (np.zeros(8, np.uint8), r"got \(8,\)"),
        (np.zeros((0, 9, 3), np.uint8), "one pixel or more"),
        (torch.zeros(3, 8, 9), r"\(3, H, W\) uint8"),
        (None, "an image array has shape"),
    ],
)
def test_other_arrays_are_refused_by_name(given, words):
    with pytest.raises(UserError, match=words):
        decode.pixels_of(given)


def test_a_damaged_file_that_pil_has_opened_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    for given in (Image.open(tmp_path / "a.png"), Image.open(io.BytesIO(data[: len(data) // 2]))):
        with pytest.raises(UserError, match="^cannot read the image .*"):
            decode.pixels_of(given)


def claiming(folder):
    """Files of a few bytes that claim 65535 x 65535 pixels."""
    Image.new("RGB", (16, 16)).save(folder / "a.jpg")
    data = bytearray((folder / "a.jpg").read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    (folder / "a.jpg").write_bytes(data)
    png(folder / "b.png", np.zeros((4, 4, 3), np.uint16), 2)
    data = bytearray((folder / "b.png").read_bytes())
    data[16:24] = struct.pack(">II", 65535, 65535)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (folder / "b.png").write_bytes(data)
    (folder / "c.ppm").write_bytes(b"P6 65535 65535 255\n" + bytes(30))
    (folder / "d.bmp").write_bytes(
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 65535, 65535, 1, 24, 0, 0, 1, 1, 0, 0)
    )
    Image.new("P", (4, 4)).save(folder / "e.gif")
    data = bytearray((folder / "e.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    (folder / "e.gif").write_bytes(data)
    Image.new("L", (4, 4)).save(folder / "f.tif", tiffinfo={})
    data = (folder / "f.tif").read_bytes()
    for tag in (256, 257):
        start = data.index(struct.pack("<HHI", tag, 4, 1))
        data = data[: start + 8] + struct.pack("<I", 65535) + data[start + 12 :]
    (folder / "f.tif").write_bytes(data)
    return sorted(folder.iterdir())


def test_a_size_that_no_memory_holds_is_named_and_not_allocated(tmp_path):
    for path in claiming(tmp_path):
        with pytest.raises(UserError, match=r"cannot read the image .* \(it claims 65535 x 65535 pixels\)"):
            decode.decode(str(path))


def test_what_would_start_another_program_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for function in (decode.decode, decode.check_header):
        with pytest.raises(UserError, match="it is no image that we know"):
            function(str(tmp_path / "a.png"))


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert decode.decode(str(tmp_path / name))[:, 0, 0].tolist() == [255, 0, 0]
