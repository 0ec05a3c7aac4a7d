"""ImageLoader: the same images however they are read."""

import numpy as np
import pytest
import torch

from metric_kd.data import ImageLoader, ImageRecords, loading
from metric_kd.data.decode import decode
from metric_kd.data.transforms import Geometry, resize
from metric_kd.errors import UserError


@pytest.fixture
def files(tmp_path, picture):
    """Twelve files of several shapes in four classes."""
    paths = [tmp_path / "images" / f"{k:02d}.{'png' if k % 2 else 'jpg'}" for k in range(12)]
    for k, path in enumerate(paths):
        picture(path, (90 + 5 * k, 120 - 3 * k), seed=k)
    return ImageRecords("files", np.arange(12) % 4, ("a", "b", "c", "d"), paths=tuple(map(str, paths)))


@pytest.fixture
def small():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    return ImageRecords("small", np.arange(20) % 5, tuple("abcde"), pixels=pixels)


BATCHES = [np.array([3, 1, 4]), np.array([11, 5, 9]), np.array([2, 6])]


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_batches_hold_what_they_say(files):
    loader = ImageLoader(files, Geometry(96))
    for rows, batch in zip(BATCHES, loader.train(BATCHES, epoch=0), strict=True):
        assert batch.images.shape == (len(rows), 3, 96, 96) and batch.images.dtype == torch.uint8
        assert batch.indices.tolist() == rows.tolist() and batch.labels.tolist() == files.labels[rows].tolist()
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.teacher_images is None and batch.views is None
    tests = list(loader.test(5))
    assert [len(b.images) for b in tests] == [5, 5, 2]
    assert torch.cat([b.indices for b in tests]).tolist() == list(range(12))
    assert len(loader) == 12 and loader.skipped == [] and loader.records is files


def test_a_test_view_is_the_centre_of_the_resized_file(files):
    loader = ImageLoader(files, Geometry(96))
    batch = loader.example(3)
    for k in range(3):
        whole = resize(decode(files.paths[k])[None], 110)[0]
        torch.testing.assert_close(batch.images[k], whole[:, 7:103, 7:103])


def test_a_training_view_is_a_crop_of_the_resized_file(files):
    geometry = Geometry(96)
    batch = next(iter(ImageLoader(files, geometry, seed=3).train(BATCHES, epoch=2)))
    crops = geometry.draw(3, 2, BATCHES[0], 110)
    for k, row in enumerate(BATCHES[0]):
        whole = resize(decode(files.paths[row])[None], 110)[0]
        patch = whole[:, crops.top[k] : crops.top[k] + 96, crops.left[k] : crops.left[k] + 96]
        torch.testing.assert_close(batch.images[k], patch.flip(2) if crops.flip[k] else patch)


@pytest.mark.parametrize("geometry", [Geometry(96), Geometry(48, 96)], ids=["one view", "two views"])
def test_any_number_of_workers_gives_the_same(files, geometry):
    here = ImageLoader(files, geometry, seed=1)
    state = torch.get_rng_state()
    there = ImageLoader(files, geometry, seed=1, workers=2)
    for epoch in (0, 1):
        same(here.train(BATCHES, epoch), there.train(BATCHES, epoch))
    same(here.test(5), there.test(5))
    assert torch.equal(torch.get_rng_state(), state), "loading takes no numbers from the global generator"


def test_an_epoch_left_early_or_still_open_disturbs_nothing(files):
    loader, plain = (ImageLoader(files, Geometry(96), workers=workers) for workers in (2, 0))
    for _ in loader.train(BATCHES, 0):
        break
    open_epoch = loader.train(BATCHES, 1)
    first = next(open_epoch)
    same(loader.test(12), plain.test(12))
    same(loader.train(BATCHES, 2), plain.train(BATCHES, 2))
    same([first, *open_epoch], plain.train(BATCHES, 1))
    same(loader.train(BATCHES, 3), plain.train(BATCHES, 3))


def test_seed_epoch_and_row_decide_not_the_batch(small):
    def images(rows, seed=0, epoch=0):
        return next(iter(ImageLoader(small, Geometry(32), seed=seed).train([np.array(rows)], epoch))).images

    torch.testing.assert_close(images([3, 8, 1])[2], images([1, 2])[0])
    assert (images([0, 1, 2]) != images([0, 1, 2], epoch=1)).any()
    assert (images([0, 1, 2]) != images([0, 1, 2], seed=1)).any()


def test_images_of_the_size_of_the_crop_are_tested_as_they_are(small):
    batch = ImageLoader(small, Geometry(32)).example(20)
    np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), small.pixels)


def test_characters_are_never_mirrored(small):
    from dataclasses import replace

    asymmetric = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    asymmetric[:, :, :16] = 255
    for flip in (True, False):
        loader = ImageLoader(replace(small, pixels=asymmetric, flip=flip), Geometry(32))
        mirrored = [
            bool(image[0, 16, 4] < image[0, 16, 27])
            for epoch in range(5)
            for batch in loader.train([np.arange(20)], epoch)
            for image in batch.images
        ]
        assert any(mirrored) is flip


def test_a_teacher_of_another_size_sees_the_same_crop(files, small):
    for records, geometry in ((files, Geometry(48, 96)), (files, Geometry(96, 48)), (small, Geometry(32, 64))):
        alone = ImageLoader(records, Geometry(geometry.crop))
        for one, both in zip(alone.train(BATCHES, 1), ImageLoader(records, geometry).train(BATCHES, 1), strict=True):
            swapped = geometry.input_size == geometry.crop
            large, little = (both.images, both.teacher_images) if swapped else (both.teacher_images, both.images)
            torch.testing.assert_close(large, one.images)
            size = min(geometry.input_size, geometry.teacher_input_size)
            torch.testing.assert_close(little, resize(one.images, size))


def test_small_inputs_are_decoded_once(files):
    import os

    loader = ImageLoader(files, Geometry(64))
    expected = [resize(decode(p)[None], 73)[0, :, 4:68, 4:68] for p in files.paths]
    for path in files.paths:
        os.unlink(path)
    torch.testing.assert_close(loader.example(12).images, torch.stack(expected))
    assert loader.records.paths == files.paths


def test_small_files_of_exactly_the_input_size_are_not_scaled(tmp_path, picture):
    pixels = np.stack([picture(tmp_path / f"{k}.png", (32, 32), seed=k) for k in range(4)])
    paths = tuple(str(tmp_path / f"{k}.png") for k in range(4))
    records = ImageRecords("files", np.arange(4) % 2, ("a", "b"), paths=paths)
    in_memory = ImageRecords("pixels", np.arange(4) % 2, ("a", "b"), pixels=pixels)
    order = [np.array([1, 3, 0])]
    same(ImageLoader(records, Geometry(32)).train(order, 0), ImageLoader(in_memory, Geometry(32)).train(order, 0))
    picture(tmp_path / "3.png", (33, 32), seed=3)
    assert ImageLoader(records, Geometry(32))._batches.source.side == 37


def test_pixels_for_a_large_input_are_resized_batch_by_batch(small):
    loader = ImageLoader(small, Geometry(112))
    whole = resize(torch.from_numpy(small.pixels).permute(0, 3, 1, 2), 128)
    torch.testing.assert_close(loader.example(20).images, whole[:, :, 8:120, 8:120])
    assert next(iter(loader.train([np.array([19, 0])], 0))).images.shape == (2, 3, 112, 112)


def spoil(files):
    """Make row 3 a cut JPEG or PNG, row 6 empty and row 7 text."""
    with open(files.paths[3], "rb+") as file:
        file.truncate(200)
    open(files.paths[6], "wb").close()
    with open(files.paths[7], "w") as file:
        file.write("no image, but long enough to be one")


@pytest.mark.parametrize("size", [32, 96])
def test_the_first_unreadable_file_is_named(files, size):
    spoil(files)
    first = 3 if size == 32 else 6  # large images are looked at only by their first bytes
    with pytest.raises(UserError) as caught:
        ImageLoader(files, Geometry(size))
    assert files.paths[first] in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_file_that_is_met_later_is_named(files, workers):
    with open(files.paths[3], "rb+") as file:
        file.truncate(200)
    loader = ImageLoader(files, Geometry(96), workers=workers)
    for batches in (loader.train(BATCHES, 0), loader.test(4)):
        with pytest.raises(UserError) as caught:
            list(batches)
        assert str(caught.value).startswith(f"cannot read the image {files.paths[3]} (")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [32, 96])
def test_unreadable_files_can_be_skipped_and_are_counted(files, size):
    spoil(files)
    loader = ImageLoader(files, Geometry(size), skip_unreadable=True)
    assert loader.skipped == [files.paths[k] for k in (3, 6, 7)]
    kept = [0, 1, 2, 4, 5, 8, 9, 10, 11]
    assert loader.records.paths == tuple(files.paths[k] for k in kept) and len(loader) == 9
    batch = next(loader.test(20))
    assert batch.labels.tolist() == loader.records.labels.tolist() == [k % 4 for k in kept]
    clean = ImageLoader(files.select(np.array(kept)), Geometry(size))
    torch.testing.assert_close(batch.images, next(clean.test(20)).images)


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    records = ImageRecords("files", np.zeros(1, dtype=np.int64), ("a",), paths=(str(tmp_path / "a.png"),))
    with pytest.raises(UserError, match="none of the 1 images"):
        ImageLoader(records, Geometry(96), skip_unreadable=True)
    with pytest.raises(UserError, match="holds no images"):
        ImageLoader(records.select(np.zeros(1, dtype=bool)), Geometry(96))


def test_resized_images_are_ready_to_be_copied(tmp_path):
    """Pixel by pixel, as batches hold them, and the same as of a planar image."""
    import torch
    from PIL import Image

    from metric_kd.data.decode import decode
    from metric_kd.data.pack import decode_resized
    from metric_kd.data.transforms import resize

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png"):
        Image.fromarray(pixels).save(tmp_path / name)
        found = decode_resized(str(tmp_path / name), 32)
        planar = resize(decode(str(tmp_path / name)).contiguous()[None], 32)[0]
        assert found.flags.c_contiguous
        assert torch.equal(torch.from_numpy(found).permute(2, 0, 1), planar)


def test_the_sizes_of_files_are_looked_at_once(files, monkeypatch):
    class NotFound:
        def of(self, paths, side):
            return None

    asked = []
    monkeypatch.setattr(loading, "side_of", lambda paths, geometry: asked.append(1) or geometry.side)
    for pack in (NotFound(), None):
        ImageLoader(files, Geometry(32), pack=pack)
    assert len(asked) == 2
