"""Masks on the grid against Pillow, loops and the loader itself; mask folders and box files, good and bad."""

from fractions import Fraction
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry
from metric_kd.errors import UserError
from metric_kd.quantify.masks import Box, Boxes, MaskFolder, box_mask, central_box, resized_side, segmentation_mask

GEOMETRIES = [
    Geometry(224, resize=224),
    Geometry(224),
    Geometry(32, resize=32),
    Geometry(32),
    Geometry(48, teacher_input_size=64),
    Geometry(20, resize=33),
]


def test_central_box_of_the_reference():
    box = central_box(16)
    assert box.sum() == 144
    assert np.flatnonzero(box.any(0)).tolist() == np.flatnonzero(box.any(1)).tolist() == list(range(2, 14))


@pytest.mark.parametrize("grid", range(6, 60))
def test_central_box_is_its_formula_in_exact_numbers(grid):
    inside = [i for i in range(grid) if grid // 6 <= i <= 5 * grid // 6]
    expected = np.array([[r in inside and c in inside for c in range(grid)] for r in range(grid)])
    assert (central_box(grid) == expected).all()


@pytest.mark.parametrize("share", [1 / 6, 0.01, 0.1, 0.25, 1 / 3, 0.49])
def test_central_box_leaves_both_parts(share):
    for grid in range(3, 40):
        box = central_box(grid, share)
        assert box.any() and not box.all(), grid
        assert box.shape == (grid, grid)


def test_central_box_with_a_decimal_share():
    assert np.flatnonzero(central_box(10, 0.3).any(0)).tolist() == [3, 4, 5, 6, 7]  # 10 * (1 - 0.3) in floats is 7.0


@pytest.mark.parametrize("grid, share", [(2, 1 / 6), (0, 1 / 6), (8, 0.0), (8, 0.5), (8, -0.1), (8, float("nan"))])
def test_central_box_refuses(grid, share):
    with pytest.raises(UserError):
        central_box(grid, share)


def nearest(image: np.ndarray, size: int) -> np.ndarray:
    """Resized to a square: every pixel is the one that its centre falls on, in exact numbers."""
    out = np.empty((size, size), dtype=image.dtype)
    for r in range(size):
        for c in range(size):
            out[r, c] = image[
                tuple(int((k + Fraction(1, 2)) * n / size) for k, n in zip((r, c), image.shape, strict=True))
            ]
    return out


def pillow_nearest(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST))


def step_by_step(mask: np.ndarray, geometry: Geometry, grid: int, resize) -> np.ndarray:
    """The way of an image: square, centre crop, cells."""
    side = geometry.crop if geometry.keeps(*mask.shape) else geometry.side
    start = (side - geometry.crop) // 2
    crop = resize(mask, side)[start : start + geometry.crop, start : start + geometry.crop]
    return resize(crop, grid) > 0


@pytest.mark.parametrize("geometry", GEOMETRIES[2:])
@pytest.mark.parametrize("size", [(100, 37), (5, 300), (32, 32), (64, 64), (1, 1)])
def test_segmentation_against_exact_loops(geometry, size):
    for grid in (1, 3, 8, 16):
        mask = np.random.default_rng(grid).choice(np.array([0, 0, 1, 255], dtype=np.uint8), size)
        assert (segmentation_mask(mask, geometry, grid) == step_by_step(mask, geometry, grid, nearest)).all()


@pytest.mark.parametrize("geometry", GEOMETRIES[:3])
@pytest.mark.parametrize("size", [(224, 224), (100, 37), (5, 300), (500, 375)])
def test_segmentation_against_pillow(geometry, size):
    """Only where Pillow, which adds up floats, does not meet an edge between two pixels."""
    for grid in (1, 8, 16):
        mask = np.random.default_rng(grid).choice(np.array([0, 0, 1, 255], dtype=np.uint8), size)
        assert (segmentation_mask(mask, geometry, grid) == step_by_step(mask, geometry, grid, pillow_nearest)).all()


def test_segmentation_of_the_reference():
    """Resized to 224, then nearest to 16: of a mask without fine detail, any rule gives the pixel at the cell's start."""
    coarse = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(bool)
    mask = coarse.repeat(28, 0).repeat(21, 1)  # 448 x 336
    assert (segmentation_mask(mask, Geometry(224, resize=224), 16) == coarse).all()


def test_segmentation_of_uneven_cells():
    """AlexNet's 227 px do not divide by 16; every cell takes one pixel, within itself."""
    mask = np.arange(227)[:, None] * np.ones((1, 227)) - 100  # > 0 from row 101 on
    found = segmentation_mask(mask, Geometry(227, resize=227), 16)
    assert (found == (np.floor((np.arange(16) + 0.5) * 227 / 16) > 100)[:, None]).all()


def seen(mask: np.ndarray, geometry: Geometry, grid: int, tmp_path=None) -> tuple[np.ndarray, np.ndarray]:
    """What the loader's test view shows at the cells of a picture of the mask, and which cells are of one value."""
    picture = np.stack([mask.astype(np.uint8) * 255] * 3, -1)
    labels, names = np.zeros(1, dtype=np.int64), ("a",)
    if tmp_path is None:
        records = ImageRecords("x", labels, names, pixels=picture[None])
    else:
        Image.fromarray(picture).save(tmp_path / "x.png")
        records = ImageRecords("x", labels, names, paths=(str(tmp_path / "x.png"),))
    view = next(ImageLoader(records, geometry, seed=0, workers=0).test(1)).images[0, 0].numpy()
    size = len(view)
    cells = [slice(k * size // grid, -(-(k + 1) * size // grid)) for k in range(grid)]
    low = np.array([[view[r, c].min() for c in cells] for r in cells])
    high = np.array([[view[r, c].max() for c in cells] for r in cells])
    return low > 127, (low > 127) == (high > 127)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(90, 61), (224, 224), (32, 32)])
def test_masks_take_the_way_of_the_image(geometry, size, tmp_path):
    mask = np.zeros(size, dtype=bool)
    box = (size[1] // 3, size[0] // 5, size[1] // 2, size[0] // 3)
    mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
    shown, certain = seen(mask, geometry, 8)
    assert certain.mean() > 0.3 and shown[certain].any()
    for found in (segmentation_mask(mask, geometry, 8), box_mask(box, size, geometry, 8)):
        assert (found == shown)[certain].all()


def test_masks_of_images_from_files_take_the_side_of_their_loader(tmp_path):
    """Large images are resized even where their size is that of the crop."""
    geometry = Geometry(224)
    mask = np.zeros((224, 224), dtype=bool)
    mask[:20] = mask[:, 200:] = True
    shown, certain = seen(mask, geometry, 16, tmp_path)
    assert resized_side((224, 224), geometry) == geometry.side == 256
    found = segmentation_mask(mask, geometry, 16, side=geometry.side)
    assert (found == shown)[certain].all()
    assert (segmentation_mask(mask, geometry, 16) == shown)[certain].all()


@pytest.mark.parametrize("mask", [np.zeros((2, 3, 3)), np.zeros(4), np.zeros((0, 4))])
def test_segmentation_refuses_what_is_no_plane(mask):
    with pytest.raises(UserError, match="height, width"):
        segmentation_mask(mask, GEOMETRIES[0], 4)


sizes = st.integers(1, 300)


@settings(max_examples=150, deadline=None)
@given(
    x=st.integers(-20, 200), y=st.integers(-20, 200), width=sizes, height=sizes,
    size=st.tuples(sizes, sizes), crop=st.integers(1, 64), more=st.integers(0, 30), grid=st.integers(1, 17),
)  # fmt: skip
def test_boxes_against_exact_loops(x, y, width, height, size, crop, more, grid):
    rows, columns = size
    geometry = Geometry(crop, resize=crop + more)
    if x >= columns or y >= rows or x + width <= 0 or y + height <= 0:
        with pytest.raises(UserError, match="does not lie in an image"):
            box_mask((x, y, width, height), size, geometry, grid)
        return
    side, offset = crop + more, more // 2
    expected = np.zeros((grid, grid), dtype=bool)
    for r in range(grid):
        for c in range(grid):
            down = (offset + Fraction(2 * r + 1, 2 * grid) * crop) * rows / side
            right = (offset + Fraction(2 * c + 1, 2 * grid) * crop) * columns / side
            expected[r, c] = y <= down < y + height and x <= right < x + width
    assert (box_mask((x, y, width, height), size, geometry, grid) == expected).all()


def test_a_box_of_the_whole_image_is_all_foreground_and_its_edges_count_once():
    whole = Geometry(224, resize=224)
    assert box_mask((0, 0, 50, 30), (30, 50), whole, 16).all()
    left, right = (box_mask((x, 0, 25, 30), (30, 50), whole, 5) for x in (0, 25))
    assert (left ^ right).all()  # the centre of the middle column lies on their common edge
    upper, lower = (box_mask((0, y, 50, 15), (30, 50), whole, 5) for y in (0, 15))
    assert (upper ^ lower).all()


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (0, 0, 4, -1), (9, 0, 2, 2), (0, -5, 2, 5), (float("nan"), 0, 1, 1)])
def test_boxes_that_are_empty_or_elsewhere_are_refused(box):
    with pytest.raises(UserError):
        box_mask(box, (6, 9), Geometry(8, resize=8), 4)


@pytest.fixture
def masks(tmp_path):
    folder = tmp_path / "masks"
    (folder / "jpg.birds" / "deep").mkdir(parents=True)
    return folder


PLANE = np.array([[0, 1, 0], [255, 0, 7]], dtype=np.uint8)


def save(array, file, mode=None):
    Image.fromarray(array, mode).save(file) if mode is None else Image.fromarray(array).convert(mode).save(file)


def test_masks_are_found_by_relative_path(masks):
    """A folder and a name with the suffix inside, which replacing text in the path would break."""
    save(PLANE, masks / "jpg.birds" / "a.jpg.1.PNG")
    np.save(masks / "jpg.birds" / "deep" / "b.npy", PLANE > 0)
    folder = MaskFolder(masks)
    assert (folder.mask_for("jpg.birds/a.jpg.1.jpg") == (PLANE > 0)).all()
    assert (folder.mask_for("./jpg.birds/deep/b.jpg") == (PLANE > 0)).all()
    assert (folder.mask_for(PurePosixPath("jpg.birds/deep/b.webp")) == (PLANE > 0)).all()
    assert (folder.mask_for(PureWindowsPath("jpg.birds\\deep\\b.webp")) == (PLANE > 0)).all()
    asked = ["jpg.birds/a.jpg.1.jpg", "jpg.birds/a.jpg", "none/b.jpg", "b.jpg"]
    assert folder.missing(asked) == asked[1:]
    assert MaskFolder(str(masks)).missing(iter(asked[:1])) == []


def test_masks_of_every_kind(masks):
    palette = Image.fromarray(PLANE)
    palette = palette.convert("P")
    palette.putdata(PLANE.ravel())
    palette.putpalette([0, 0, 0] * 256)  # black all over: what counts is the index
    palette.save(masks / "palette.png")
    save(PLANE * 255 > 0, masks / "bits.png")
    colour = np.zeros((2, 3, 3), dtype=np.uint8)
    colour[..., 2] = PLANE
    save(colour, masks / "colour.png")
    save(np.dstack([colour, np.full((2, 3), 255, dtype=np.uint8)]), masks / "alpha.png")
    save(np.dstack([PLANE, np.full((2, 3), 255, dtype=np.uint8)]), masks / "grey_alpha.png")
    save(PLANE.astype(np.uint16) * 200, masks / "deep16.png")
    np.save(masks / "array.npy", colour)
    np.save(masks / "floats.npy", PLANE / 1000)
    folder = MaskFolder(masks)
    for name in ("palette", "bits", "colour", "alpha", "grey_alpha", "deep16", "array", "floats"):
        found = folder.mask_for(f"{name}.jpg")
        assert found.dtype == np.bool_ and found.shape == (2, 3) and (found == (PLANE > 0)).all(), name


def test_masks_are_turned_upright_like_images(masks):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(PLANE).save(masks / "turned.png", exif=exif)
    assert (MaskFolder(masks).mask_for("turned.jpg") == np.rot90(PLANE > 0, -1)).all()


def test_mask_errors_name_the_image_and_the_place(masks, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        MaskFolder(tmp_path / "nowhere")
    folder = MaskFolder(masks)
    with pytest.raises(UserError, match=r"the image c/x\.jpg has no mask.*masks/c/x") as error:
        folder.mask_for("c/x.jpg")
    assert str(masks) in str(error.value)
    for wrong in ("/c/x.jpg", "../x.jpg", "c/../../x.jpg", "", "."):
        with pytest.raises(UserError, match="relative"):
            folder.missing([wrong])


def test_two_masks_are_refused_before_long_work(masks):
    save(PLANE, masks / "x.png")
    np.save(masks / "x.npy", PLANE)
    for ask in (lambda f: f.missing(["x.jpg"]), lambda f: f.mask_for("x.jpg")):
        with pytest.raises(UserError, match=r"two masks.*x\.npy, x\.png"):
            ask(MaskFolder(masks))


def test_masks_that_cannot_be_read(masks):
    (masks / "a.png").write_bytes(b"no image")
    (masks / "b.npy").write_bytes(b"")
    np.save(masks / "c.npy", np.zeros(4))
    np.save(masks / "d.npy", np.array([["a", "b"]]))
    np.save(masks / "e.npy", np.array([[None]]), allow_pickle=True)
    for name in "abcde":
        with pytest.raises(UserError, match=f"mask .*{name}\\."):
            MaskFolder(masks).mask_for(f"{name}.jpg")


def write(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    return file


def test_boxes_of_a_table(tmp_path):
    lines = "width, height ,y,x,path,more", "10,20.5,3,-1,a/b c.jpg,u", "", '1,2,0,0,"./a,b.jpg",v'
    boxes = Boxes(write(tmp_path / "boxes.csv", *lines))
    assert boxes.box_for("a/b c.jpg") == Box(x=-1, y=3, width=10, height=20.5)
    assert boxes.box_for("a,b.jpg") == (0, 0, 1, 2)
    assert boxes.missing(["a/b c.jpg", "b c.jpg", "images/a,b.jpg"]) == ["b c.jpg", "images/a,b.jpg"]
    with pytest.raises(UserError, match=r"the image b\.jpg has no box in .*boxes\.csv"):
        boxes.box_for("b.jpg")


def test_boxes_of_cub(tmp_path):
    write(tmp_path / "images.txt", "1 001.Black/a 1.jpg", "2 001.Black/b.jpg", "3 002.White/a.jpg")
    write(tmp_path / "bounding_boxes.txt", "1 60.0 27.0 325.0 304.0", "3 0.0 1.0 2.5 3.0")
    boxes = Boxes(tmp_path / "bounding_boxes.txt")
    assert boxes.box_for("001.Black/a 1.jpg") == (60, 27, 325, 304)
    assert boxes.box_for("002.White/a.jpg") == (0, 1, 2.5, 3)
    assert boxes.missing(["001.Black/a 1.jpg", "001.Black/b.jpg"]) == ["001.Black/b.jpg"]


HEADER = "path,x,y,width,height"


@pytest.mark.parametrize(
    "lines, message",
    [
        (["path,x,y,width", "a,1,2,3"], "no column 'height' but path, x, y, width"),
        ([""], "no column 'path'"),
        ([HEADER], "has no boxes"),
        ([HEADER, "a,1,2,3,4", "b,1,two,3,4"], "line 3: y is 'two'"),
        ([HEADER, "a,1,2,nan,4"], "line 2: width is 'nan'"),
        ([HEADER, "a,inf,2,3,4"], "line 2: x is 'inf'"),
        ([HEADER, "a,1,2,,4"], "line 2: width is ''"),
        ([HEADER, "a,1,2,3,0"], "line 2: the box is 3 x 0 px"),
        ([HEADER, "a,1,2,-3,4"], "line 2: the box is -3 x 4 px"),
        ([HEADER, "a,1,2,3,4", "", "./a,5,6,7,8"], "line 4: a has a box already"),
        ([HEADER, "a,1,2,3"], "line 2 has not 5 cells"),
        ([HEADER, "a,1,2,3,4,5"], "line 2 has not 5 cells"),
        ([HEADER, "/a,1,2,3,4"], "line 2: '/a' is not the path"),
        ([HEADER, " ,1,2,3,4"], "line 2: '' is not the path"),
    ],
)
def test_bad_tables_of_boxes(tmp_path, lines, message):
    with pytest.raises(UserError, match=r"boxes\.csv") as error:
        Boxes(write(tmp_path / "boxes.csv", *lines))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "images, boxes, message",
    [
        (["1 a.jpg"], ["2 1 2 3 4"], "line 1: images.txt has no image '2'"),
        (["1 a.jpg"], ["1 1 2 3"], "line 1 has 4 cells and not 5"),
        (["1 a.jpg"], ["1 1 2 3 4", "1 1 2 3 4"], "line 2: a.jpg has a box already"),
        (["1 a.jpg"], ["1 1 2 3 4 5"], "line 1: height is '4 5'"),
        (["1 a.jpg", "1 b.jpg"], ["1 1 2 3 4"], "line 2: the number 1 comes twice"),
        (["1"], ["1 1 2 3 4"], "line 1 has 1 cells and not 2"),
        (["1 a.jpg"], [""], "has no boxes"),
    ],
)
def test_bad_boxes_of_cub(tmp_path, images, boxes, message):
    write(tmp_path / "images.txt", *images)
    with pytest.raises(UserError) as error:
        Boxes(write(tmp_path / "bounding_boxes.txt", *boxes))
    assert message in str(error.value)


def test_box_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="cannot read the boxes"):
        Boxes(tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"images\.txt .*needs images\.txt beside it"):
        Boxes(write(tmp_path / "bounding_boxes.txt", "1 1 2 3 4"))
    (tmp_path / "bytes.csv").write_bytes(b"path,x\xff")
    with pytest.raises(UserError, match="no UTF-8 CSV"):
        Boxes(tmp_path / "bytes.csv")
