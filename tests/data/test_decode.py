"""Every format comes out as Pillow would show it; what cannot be read is named."""

import numpy as np
import pytest
import torch

from metric_kd.data import decode
from metric_kd.errors import UserError

FORMATS = [
    ("a.jpg", "RGB", {"quality": 90}),
    ("a.jpg", "L", {"quality": 90}),
    ("a.jpg", "CMYK", {"quality": 90}),
    ("a.jpeg", "RGB", {"progressive": True}),
    ("a.png", "RGB", {}),
    ("a.png", "RGBA", {}),
    ("a.png", "LA", {}),
    ("a.png", "L", {}),
    ("a.png", "1", {}),
    ("a.png", "P", {}),
    ("a.png", "P", {"bits": 2}),
    ("a.bmp", "RGB", {}),
    ("a.tiff", "RGB", {}),
    ("a.gif", "P", {}),
    ("a.webp", "RGB", {"lossless": True}),
    ("a.ppm", "RGB", {}),
]


@pytest.mark.parametrize(("name", "mode", "options"), FORMATS, ids=[f"{n[2:]}-{m}-{len(o)}" for n, m, o in FORMATS])
def test_formats_equal_pillow(tmp_path, picture, name, mode, options):
    from PIL import Image

    path = tmp_path / name
    picture(path, (23, 17), mode=mode, **options)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    decode.check_header(str(path))
    image = decode.decode(str(path))
    assert image.dtype == torch.uint8 and image.shape == (3, 17, 23)
    tolerance = 1 if name.startswith("a.j") else 0
    assert abs(image.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= tolerance
    assert decode.all_have_size([str(path)], 23) is False


def test_one_bit_and_palette_images_have_their_colours(tmp_path):
    from PIL import Image

    bits = np.array([[0, 255, 0], [255, 255, 0]], dtype=np.uint8)
    Image.fromarray(bits).convert("1", dither=0).save(tmp_path / "bits.png")
    image = decode.decode(str(tmp_path / "bits.png"))
    np.testing.assert_array_equal(image.numpy(), np.broadcast_to(bits, (3, 2, 3)))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    image = decode.decode(str(tmp_path / "palette.png"))
    assert image[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]


def test_sixteen_bits_become_eight(tmp_path):
    from PIL import Image

    wide = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(wide).save(tmp_path / name)
        assert decode.decode(str(tmp_path / name))[0].tolist() == [[0, 0, 1], [128, 255, 255]]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.webp"])
def test_images_stand_upright(tmp_path, name):
    from PIL import Image

    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    image = decode.decode(str(tmp_path / name))
    assert image.shape == (3, 16, 8)
    assert image[:, :7].float().mean() > 250 and image[:, 9:].float().mean() < 5


def test_pillow_does_it_where_torchvision_cannot(tmp_path, picture, monkeypatch):
    """torchvision.io is deprecated: without it everything goes on."""
    import sys

    expected = picture(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    np.testing.assert_array_equal(decode.decode(str(tmp_path / "a.png")).permute(1, 2, 0).numpy(), expected)


def broken(tmp_path, picture):
    """{kind: (path, whether the header shows it)}"""
    picture(tmp_path / "good.jpg", (60, 60))
    picture(tmp_path / "good.png", (60, 60))
    for name in ("jpg", "png"):
        data = (tmp_path / f"good.{name}").read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(data[: len(data) // 2])
        (tmp_path / f"stub.{name}").write_bytes(data[:10])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is not an image at all")
    return {
        "missing.jpg": True, "empty.jpg": True, "text.jpg": True,
        "cut.jpg": False, "cut.png": False, "stub.jpg": False, "stub.png": False,
    }  # fmt: skip


def test_unreadable_files_are_named_in_one_sentence(tmp_path, picture):
    for name, by_header in broken(tmp_path, picture).items():
        path = str(tmp_path / name)
        for check in (decode.decode, decode.check_whole, *([decode.check_header] if by_header else [])):
            with pytest.raises(UserError) as caught:
                check(path)
            message = str(caught.value)
            assert message.startswith(f"cannot read the image {path} (") and "\n" not in message
            assert "--skip_unreadable" in message


def test_each_keeps_the_order_and_gives_errors_back(tmp_path, picture):
    names = []
    for k in range(150):
        path = tmp_path / f"{k:03d}.png"
        if k % 50 == 7:
            path.write_bytes(b"")
        else:
            picture(path, (3, 2), seed=k)
        names.append(str(path))
    results = list(decode.each(decode.decode, names, "test", progress=False))
    assert [k for k, r in enumerate(results) if isinstance(r, UserError)] == [7, 57, 107]
    for k in (0, 31, 32, 149):
        torch.testing.assert_close(results[k], decode.decode(names[k]))
    stopped = decode.each(decode.decode, names, "test", progress=False)
    next(stopped)
    stopped.close()


def test_the_state_of_a_file_that_is_not_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"12345")
    assert decode.state_of(str(tmp_path / "a.png")).st_size == 5
    with pytest.raises(UserError, match=r"cannot read the image .*b\.png \(No such file or directory\); repair"):
        decode.state_of(str(tmp_path / "b.png"))
