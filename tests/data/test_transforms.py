"""Geometry against obvious per-image code."""

import numpy as np
import pytest
import torch

from metric_kd.data.transforms import Geometry, _mix, resize, uniform
from metric_kd.errors import UserError

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def pixels_of(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def splitmix(state):
    """One output of splitmix64 in Python integers."""
    z = state & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def test_the_mixer_is_splitmix64():
    """The first outputs of the published generator for seed 1234567."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + GAMMA) & MASK
        outputs.append(splitmix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = np.array([(1234567 + k * GAMMA) & MASK for k in (1, 2, 3)], dtype=np.uint64)
    assert _mix(states).tolist() == outputs


def test_uniform_depends_on_its_arguments_only():
    whole = uniform(3, 7, np.arange(1000), 3)
    assert whole.shape == (1000, 3) and whole.min() >= 0 and whole.max() < 1
    np.testing.assert_array_equal(uniform(3, 7, np.array([999, 5]), 3), whole[[999, 5]])
    np.testing.assert_array_equal(uniform(3, 7, np.arange(1000), 2), whole[:, :2])
    for other in (uniform(4, 7, np.arange(1000), 3), uniform(3, 8, np.arange(1000), 3)):
        assert (other != whole).all()


def test_uniform_equals_the_same_formula_in_python_integers():
    """seed, epoch and index are absorbed one after the other; then one output per draw. It must never change."""
    for seed, epoch, index in ((0, 0, 0), (0, 1, 5), (2**63 + 11, 80, 120_052)):
        key = splitmix(splitmix(seed + GAMMA) + (epoch + 1) * GAMMA)
        stream = splitmix(key + index * GAMMA)
        expected = [(splitmix(stream + k * GAMMA) >> 11) / 2**53 for k in (1, 2, 3)]
        assert uniform(seed, epoch, np.array([index]), 3)[0].tolist() == expected


def test_uniform_is_flat_and_uncorrelated():
    u = np.stack([uniform(s, e, np.arange(2000), 3) for s in range(3) for e in range(3)]).reshape(-1, 3)
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert abs(counts / counts.mean() - 1).max() < 0.06
    assert abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.03
    neighbours = uniform(0, 0, np.arange(20000), 1)[:, 0]
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.03
    same_image = np.array([uniform(0, e, np.arange(2000), 1)[:, 0] for e in range(2)])
    assert abs(np.corrcoef(same_image)[0, 1]) < 0.07


@pytest.mark.parametrize(("size", "side"), [(8, 8), (32, 32), (32, 37), (100, 120)])
def test_cut_equals_padding_and_slicing(size, side):
    geometry = Geometry(size, resize=side)
    pixels = pixels_of(9, side)
    rows = np.array([4, 0, 8, 4, 2, 1])
    crops = geometry.draw(0, 1, rows, side)
    crops = crops._replace(flip=np.array([True, False] * 3))
    pad = size // 8 if size == side else 0
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    images = geometry.cut(pixels, rows, crops)
    assert images.shape == (6, 3, size, size) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    for k, row in enumerate(rows):
        expected = padded[row, crops.top[k] : crops.top[k] + size, crops.left[k] : crops.left[k] + size]
        expected = expected[:, ::-1] if crops.flip[k] else expected
        np.testing.assert_array_equal(images[k].permute(1, 2, 0).numpy(), expected)


def test_random_crops_reach_every_corner_and_both_flips():
    geometry = Geometry(32)
    crops = geometry.draw(0, 0, np.arange(5000), 32)
    assert set(crops.top) == set(crops.left) == set(range(9))
    assert 0.45 < crops.flip.mean() < 0.55
    crops = Geometry(224).draw(0, 0, np.arange(20000), 256)
    assert (crops.top.min(), crops.top.max()) == (0, 32)


def test_nothing_is_mirrored_without_flip():
    assert not Geometry(32, flip=False).draw(0, 0, np.arange(1000), 32).flip.any()


def test_an_image_of_one_pixel_can_be_cut():
    geometry = Geometry(1)
    assert geometry.cut(pixels_of(2, 1), np.arange(2), geometry.draw(0, 0, np.arange(2), 1)).shape == (2, 3, 1, 1)


def test_the_test_view_is_the_centre():
    pixels = pixels_of(2, 256)
    geometry = Geometry(224)
    images = geometry.cut(pixels, np.arange(2), geometry.centre(2, geometry.side))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[:, 16:240, 16:240])
    small = pixels_of(2, 32)
    geometry = Geometry(32)
    images = geometry.cut(small, np.arange(2), geometry.centre(2, 32))
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), small)


@pytest.mark.parametrize("shape", [(100, 140), (20, 20), (300, 31)])
def test_resize_is_antialiased_as_pillow_does_it(shape):
    from PIL import Image

    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(smooth).resize(shape[::-1], Image.Resampling.BICUBIC))
    ours = resize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], 64)[0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR))
    assert abs(ours.astype(int) - theirs.astype(int)).max() <= 2


def test_teacher_and_student_see_the_same_crop():
    pixels = pixels_of(4, 73)
    for student, teacher in ((32, 64), (64, 32)):
        geometry = Geometry(student, teacher)
        assert (geometry.crop, geometry.side) == (64, 73)
        rows = np.arange(4)
        crops = geometry.cut(pixels, rows, geometry.draw(0, 3, rows, 73))
        images, teacher_images = geometry.views(crops)
        large, small = (images, teacher_images) if student > teacher else (teacher_images, images)
        torch.testing.assert_close(large, crops)
        torch.testing.assert_close(small, resize(crops, 32))
        assert images.shape[-1] == student and teacher_images.shape[-1] == teacher
        alone = Geometry(64).cut(pixels, rows, Geometry(64).draw(0, 3, rows, 73))
        torch.testing.assert_close(crops, alone)


def test_equal_sizes_give_no_teacher_view():
    crops = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert Geometry(32, 32).views(crops)[1] is None
    assert Geometry(32).views(crops)[1] is None


def test_sizes():
    assert Geometry(224).side == 256
    assert Geometry(224, 299).side == round(299 * 256 / 224)
    assert Geometry(32).keeps(32, 32) and not Geometry(32).keeps(32, 40) and not Geometry(32, resize=40).keeps(32, 32)
    with pytest.raises(UserError, match="resize to more"):
        Geometry(224, resize=200)
    with pytest.raises(UserError, match="input_size"):
        Geometry(0)
