"""The embedded data set: what its classes are, that it can be repeated, and that pixels alone do not solve it."""

import numpy as np
import pytest
import torch

from metric_kd.data import glyphs as module
from metric_kd.data.glyphs import glyph_classes, glyphs
from metric_kd.data.records import DATASETS
from metric_kd.errors import UserError

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def whole():
    """The data set as users get it (about three seconds)."""
    return glyphs()


def class_of(character: str) -> str:
    (found,) = [group for group in glyph_classes() if character in group]
    return found


def raw_recall(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Recall@1 in percent of Euclidean neighbours among pixel vectors, each image against all others."""
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1)).float()
    distances = torch.cdist(flat, flat).fill_diagonal_(float("inf"))
    return 100 * float((labels[distances.argmin(1).numpy()] == labels).mean())


def test_has_300_classes_of_20_images_in_disjoint_halves(whole):
    train, test = whole
    assert train.num_classes + test.num_classes == len(glyph_classes()) >= 300
    assert abs(train.num_classes - test.num_classes) <= 1
    assert not set(train.class_names) & set(test.class_names)
    for side in whole:
        assert np.bincount(side.labels).min() >= 20
        assert side.pixels.shape == (len(side), 32, 32, 3) and side.pixels.dtype == np.uint8
        assert not side.flip
        assert all(name.startswith("U+") and name.isprintable() for name in side.class_names)


def test_both_halves_mix_the_scripts(whole):
    for side in whole:
        codes = np.array([int(name[2:6], 16) for name in side.class_names])
        for first, last in ((0x41, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x586), (0x10D0, 0x10FA)):
            assert ((first <= codes) & (codes <= last)).sum() >= 5


def test_raw_pixels_do_not_solve_it_but_are_not_noise(whole):
    recall = raw_recall(whole.test.pixels, whole.test.labels)
    assert 10 < recall < 30  # measured 22.6; chance is 0.6


def test_mean_and_std_are_those_of_the_pixels(whole):
    pixels = whole.train.pixels / 255
    assert np.abs(pixels.mean((0, 1, 2)) - whole.train.mean).max() < 0.02
    assert np.abs(pixels.std((0, 1, 2)) - whole.train.std).max() < 0.02


def test_no_two_images_of_a_class_are_nearly_the_same(whole):
    for side in whole:
        for label in range(side.num_classes):
            flat = torch.from_numpy(side.pixels[side.labels == label].reshape(24, -1)).float() / 255
            distances = torch.cdist(flat, flat).fill_diagonal_(float("inf")) / flat.shape[1] ** 0.5
            assert distances.min() > 0.02, side.class_names[label]  # root mean square over pixels


def test_every_image_shows_ink(whole):
    spread = whole.test.pixels.astype(np.float32).mean(-1).reshape(len(whole.test), -1)
    low, high = np.percentile(spread, [2, 80], axis=1)
    assert (high - low).min() > 30


@pytest.mark.parametrize(
    "alike",
    ["O0oΟοОо", "lI1|", "AΑА", "cCсС", "sSѕЅ", "vVν", "wWԝ", "xXχх", "zZΖ", "BΒВв", "PpΡρР", "aаα", "HΗН", "3З"],
)
def test_look_alikes_are_one_class(alike):
    assert len({class_of(character) for character in alike}) == 1


@pytest.mark.parametrize("different", ["bdqp", "69", "AΔ", "nu", "MW", "28", "ЖЩЮЯ", "აბგდ", "ԱԲԴ", "←→↑↓", "B8", "GC"])
def test_what_a_person_can_tell_apart_is_not_merged(different):
    assert len({class_of(character) for character in different}) == len(different)


def test_no_class_grows_out_of_bounds_and_no_character_is_in_two():
    groups = glyph_classes()
    assert max(map(len, groups)) <= 24
    assert len("".join(groups)) == len(set("".join(groups)))


def test_likeness_is_found_without_the_table():
    pairs = {frozenset(pair) for pair in module._alike(list("AΑАnuОO8"))}
    assert {frozenset("AΑ"), frozenset("AА"), frozenset("ΑА"), frozenset("ОO")} == pairs


def test_fonts_draw_what_unicode_says():
    fonts = module._fonts()
    assert not [name for name in fonts if name.startswith(("cmsy", "cmex", "cmmi", "LastResort", "STIXSiz", "STIXNon"))]
    for font, drawn in fonts.values():
        missing = bytes(font.getmask("\U0010fffd", "L"))
        for character in "AgR5":
            if ord(character) in drawn:
                assert bytes(font.getmask(character, "L")) != missing
    assert max(fonts["cmr10"][1]) < 128
    assert ord("т") not in fonts["DejaVuSerif-Italic"][1]


def test_a_hollow_character_has_less_ink_than_a_filled_one():
    font = module._fonts()["DejaVuSans-Bold"][0]
    plain, filled, hollow = (np.asarray(module._ink(font, "H", *how)).sum() for how in ((), (2,), (2, False)))
    assert hollow < filled and plain < filled


def test_same_seed_same_pixels_other_seed_other_pixels():
    first, again, other = (glyphs(per_class=4, classes=6, seed=seed) for seed in (0, 0, 1))
    assert first.train.fingerprint() == again.train.fingerprint()
    assert first.test.class_names == other.test.class_names
    assert (first.test.pixels != other.test.pixels).reshape(len(first.test), -1).any(1).all()


def test_an_image_does_not_depend_on_the_other_classes():
    few, more = glyphs(per_class=3, classes=4, train_classes=2), glyphs(per_class=3, classes=8, train_classes=4)
    assert np.array_equal(more.train.pixels, np.concatenate([few.train.pixels, few.test.pixels]))


def test_options():
    splits = DATASETS["glyphs"]("unused", per_class=2, classes=5, size=24, train_classes=3)
    assert splits.train.num_classes == 3 and splits.test.num_classes == 2
    assert splits.train.pixels.shape == (6, 24, 24, 3)


@pytest.mark.parametrize("bad", [{"per_class": 1}, {"size": 4}, {"classes": 1}, {"classes": 10**6}])
def test_options_out_of_range(bad):
    with pytest.raises(UserError, match=r"glyphs .*; "):
        glyphs(**bad)
