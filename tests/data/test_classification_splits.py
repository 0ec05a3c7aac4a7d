"""The split of a classifier: the same classes on both sides, other images; and the augmentation it trains with."""

import csv
import hashlib
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest

from metric_kd.data import Geometry, ImageLoader, ImageRecords, cifar, hold_out_images, load_dataset
from metric_kd.errors import UserError

REAL = os.environ.get("METRIC_KD_TEST_DATA")

PUBLISHED_FINE = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
).split()
"""fine_label_names of the published pickles."""

PUBLISHED_COARSE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 8 15 13 14 "
    "17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 "
    "15 6 0 17 8 14 13"
)
"""coarse_labels of the published pickles, for fine_labels 0 to 99."""


def load(name, root, **options):
    return load_dataset(name, root, task="classification", download=False, **options)


def touch(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def shown(records):
    """What each image is called, by its class."""
    names = [records.class_names[label] for label in records.labels]
    return sorted(f"{name}/{os.path.basename(path)}" for name, path in zip(names, records.paths, strict=True))


def colours(count, classes, **more):
    """Records whose images all differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).permutation(np.arange(count) % classes)
    return ImageRecords("colours", labels, tuple(f"c{k}" for k in range(classes)), pixels=pixels, **more)


# ---- CIFAR


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """pickled(name): a root with synthetic pickles of an edition, and the pixels and labels in them, by part."""

    def write(name, names, per_class=2):
        edition = getattr(cifar, name.upper())
        draw = np.random.default_rng(0)
        content, arrays = {}, {}
        for part, files in (("train", edition.train), ("test", edition.test)):
            arrays[part] = {"pixels": [], "labels": [], "coarse": []}
            for file, _ in files:
                y = draw.permutation(np.repeat(np.arange(len(names)), per_class))
                x = draw.integers(0, 256, (len(y), 32, 32, 3), dtype=np.uint8)
                batch = {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), edition.label_key: y.tolist()}
                if name == "cifar100":
                    batch["coarse_labels"] = np.array(PUBLISHED_COARSE.split(), dtype=int)[y].tolist()
                    arrays[part]["coarse"] += batch["coarse_labels"]
                content[file] = pickle.dumps(batch)
                arrays[part]["pixels"].append(x)
                arrays[part]["labels"] += y.tolist()
        content[edition.meta[0]] = pickle.dumps({edition.names_key: list(names), "coarse_label_names": [*cifar.COARSE]})
        folder = tmp_path / edition.source.inner
        folder.mkdir()
        for file, body in content.items():
            (folder / file).write_bytes(body)

        def known(files):
            return tuple((file, hashlib.md5(content[file]).hexdigest()) for file, _ in files)

        trusted = replace(edition, train=known(edition.train), test=known(edition.test), meta=known((edition.meta,))[0])
        monkeypatch.setattr(cifar, name.upper(), trusted)
        return tmp_path, {
            part: {key: np.concatenate(v) if key == "pixels" else np.array(v) for key, v in columns.items()}
            for part, columns in arrays.items()
        }

    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_gives_its_published_parts_with_all_classes(name, pickled):
    names = PUBLISHED_FINE if name == "cifar100" else [f"n{k}" for k in range(10)]
    root, expected = pickled(name, names)
    for part, records in load(name, root)._asdict().items():
        np.testing.assert_array_equal(records.pixels, expected[part]["pixels"])
        np.testing.assert_array_equal(records.labels, expected[part]["labels"])
        assert records.class_names == tuple(names) and records.labels.dtype == np.int64


def test_chosen_classes_restrict_both_parts(pickled):
    names = tuple(f"n{k}" for k in range(10))
    root, expected = pickled("cifar10", names)
    for chosen, kept in ((4, [0, 1, 2, 3]), (["n7", "n2"], [2, 7])):
        for part, records in load("cifar10", root, train_classes=chosen)._asdict().items():
            rows = np.isin(expected[part]["labels"], kept)
            np.testing.assert_array_equal(records.pixels, expected[part]["pixels"][rows])
            np.testing.assert_array_equal(np.array(kept)[records.labels], expected[part]["labels"][rows])
            assert records.class_names == tuple(names[k] for k in kept)
    assert load("cifar10", root, train_classes=10).test.num_classes == 10
    for chosen, message in (
        (11, "has 10 classes and --train_classes asks for 11"),
        (["n1", "nn"], "names 'nn', which cifar10 has not"),
        (1, "would have 1 class"),
        ([], "would have 0 class"),
        (0, "leaves nothing to train on"),
    ):
        with pytest.raises(UserError, match=message):
            load("cifar10", root, train_classes=chosen)


def test_coarse_labels_are_those_of_the_published_pickles(pickled):
    root, expected = pickled("cifar100", PUBLISHED_FINE)
    for part, records in load("cifar100", root, labels="coarse")._asdict().items():
        np.testing.assert_array_equal(records.labels, expected[part]["coarse"])
        assert records.class_names == tuple(cifar.COARSE) == tuple(sorted(cifar.COARSE)) and records.num_classes == 20
    halves = load_dataset("cifar100", root, labels="coarse")
    assert halves.train.class_names == tuple(cifar.COARSE)[:10] and halves.test.class_names == tuple(cifar.COARSE)[10:]
    rows = expected["test"]["coarse"] >= 10
    np.testing.assert_array_equal(halves.test.labels, expected["test"]["coarse"][rows] - 10)
    np.testing.assert_array_equal(halves.test.pixels, expected["test"]["pixels"][rows])
    few = load("cifar100", root, labels="coarse", train_classes=["people", "fish"])
    assert few.train.class_names == ("fish", "people") and len(few.test) == 20


def test_coarse_labels_of_a_tree(picture, tmp_path):
    for part in ("train", "test"):
        for k, name in enumerate(("bee", "trout", "beetle", "baby")):
            picture(tmp_path / part / name / "0.png", (32, 32), seed=k)
    splits = load("cifar100", tmp_path, labels="coarse")
    assert splits.test.class_names == ("fish", "insects", "people") and splits.test.labels.tolist() == [2, 1, 1, 0]
    assert splits.train.pixels is not None and load("cifar100", tmp_path).test.num_classes == 4
    picture(tmp_path / "train" / "unicorn" / "0.png", (32, 32))
    with pytest.raises(UserError, match="has no class 'unicorn' and so no superclass"):
        load("cifar100", tmp_path, labels="coarse")


@pytest.mark.skipif(not REAL, reason="METRIC_KD_TEST_DATA names no folder with real data")
def test_real_cifar100():
    train, test = load("cifar100", REAL, labels="coarse")
    assert np.bincount(train.labels).tolist() == [2500] * 20 and np.bincount(test.labels).tolist() == [500] * 20


# ---- folders, tables and what is drawn


@pytest.mark.parametrize("tested", ["test", "val"])
def test_a_folder_with_two_parts(tested, tmp_path):
    touch(tmp_path, *(f"train/{c}/{k}.jpg" for c in "abc" for k in range(2)), f"{tested}/c/9.jpg", f"{tested}/a/8.jpg")
    splits = load("folder", tmp_path)
    assert shown(splits.train) == [f"{c}/{k}.jpg" for c in "abc" for k in range(2)]
    assert splits.train.class_names == splits.test.class_names == ("a", "b", "c")  # b has no test image
    assert shown(splits.test) == ["a/8.jpg", "c/9.jpg"] and splits.test.labels.tolist() == [0, 2]
    chosen = load("folder", tmp_path, train_classes=["b", "c"])
    assert shown(chosen.test) == ["c/9.jpg"] and chosen.test.labels.tolist() == [1]
    assert set(chosen.train.labels) == {0, 1}
    touch(tmp_path, f"{tested}/d/1.jpg", "val/other/1.jpg")
    with pytest.raises(UserError, match="test part has the class 'd' and the train part has not"):
        load("folder", tmp_path)


def test_classes_without_any_test_image_are_refused(tmp_path):
    touch(tmp_path, *(f"train/{c}/1.jpg" for c in "abc"), "test/c/1.jpg")
    with pytest.raises(UserError, match="no test images of the chosen classes"):
        load("folder", tmp_path, train_classes=2)


def test_a_validation_part_serves_retrieval_too(tmp_path):
    touch(tmp_path, *(f"{part}/{c}/{part}.jpg" for part in ("train", "val") for c in "ab"))
    assert load_dataset("folder", tmp_path).test.class_names == ("b",)


def test_one_image_in_five_tests_where_there_are_no_parts(tmp_path):
    touch(tmp_path, *(f"{c}/{k:02d}.jpg" for c, n in zip("abc", (2, 10, 23), strict=True) for k in range(n)))
    splits = load("folder", tmp_path)
    assert shown(splits.test) == ["a/00.jpg", "b/02.jpg", "b/07.jpg", *(f"c/{k:02d}.jpg" for k in (2, 6, 11, 16, 20))]
    assert sorted(shown(splits.train) + shown(splits.test)) == sorted(
        f"{c}/{k:02d}.jpg" for c, n in zip("abc", (2, 10, 23), strict=True) for k in range(n)
    )
    assert splits.train.class_names == splits.test.class_names == ("a", "b", "c")
    touch(tmp_path, "d/1.jpg")
    with pytest.raises(UserError, match="the class 'd' has 1 image and a classifier needs two"):
        load("folder", tmp_path)
    assert load("folder", tmp_path, train_classes=3).train.num_classes == 3


def test_tables_with_and_without_a_split_column(tmp_path):
    touch(tmp_path, *(f"{k}.jpg" for k in range(12)))

    def write(columns, rows):
        with open(tmp_path / "table.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    write(["path", "label", "query"], [[f"{k}.jpg", "ab"[k % 2], 0] for k in range(12)])
    splits = load("table", tmp_path)
    assert len(splits.train) == 10 and sorted(splits.test.labels) == [0, 1]
    assert splits.test.query is None, "which images ask is a matter of retrieval"
    part = ["train", "train", "train", "test"]
    write(["path", "label", "split"], [[f"{k}.jpg", "cab"[k % 3], part[k % 4]] for k in range(12)])
    splits = load("table", tmp_path)
    assert shown(splits.test) == ["a/7.jpg", "b/11.jpg", "c/3.jpg"] and splits.test.class_names == ("a", "b", "c")
    write(["path", "label", "split"], [["0.jpg", "a", "train"], ["1.jpg", "b", "train"], ["2.jpg", "c", "test"]])
    with pytest.raises(UserError, match="test part has the class 'c'"):
        load("table", tmp_path)


def test_omniglot_tests_drawers_of_every_character(picture, tmp_path):
    for a, letter in (("background/Greek", 1), ("background/Latin", 2), ("evaluation/Aurek", 1)):
        for drawer in range(1, 6):
            picture(tmp_path / "omniglot-py" / f"images_{a}" / f"character{letter}" / f"0_0{drawer}.png", (9, 9))
    names = ("Aurek/character1", "Greek/character1", "Latin/character2")
    splits = load("omniglot", tmp_path)
    assert splits.train.class_names == splits.test.class_names == names and len(splits.train) == 12
    assert shown(splits.test) == [f"{name}/0_03.png" for name in names] and not splits.test.flip
    tree = load("omniglot", tmp_path / "omniglot-py" / "images_background")
    assert shown(tree.test) == [f"{name}/0_03.png" for name in names[1:]]


def test_glyphs_are_drawn_alike_for_both_tasks():
    halves = load_dataset("glyphs", "", classes=6, per_class=5)
    splits = load_dataset("glyphs", "", task="classification", classes=6, per_class=5)
    assert splits.train.class_names == splits.test.class_names == halves.train.class_names + halves.test.class_names
    assert splits.test.labels.tolist() == list(range(6)) and len(splits.train) == 24 and not splits.train.flip
    whole = np.concatenate([halves.train.pixels, halves.test.pixels])
    np.testing.assert_array_equal(splits.test.pixels, whole[2::5])


def test_what_a_data_set_does_not_offer_is_refused(tmp_path):
    for name in ("cub200", "cars196", "stanford", "sop"):
        with pytest.raises(
            UserError, match=f"^{name} has no classification split; .*\\(cifar10, cifar100, folder, glyphs"
        ):
            load(name, tmp_path)
    with pytest.raises(UserError, match=r"cifar10 has one kind of labels; leave out --labels coarse.*\(cifar100\)"):
        load("cifar10", tmp_path, labels="coarse")
    with pytest.raises(UserError, match="unknown task 'clasification'; did you mean 'classification'"):
        load_dataset("cifar10", tmp_path, task="clasification")
    with pytest.raises(UserError, match="unknown labels 'corse'; did you mean 'coarse'"):
        load("cifar100", tmp_path, labels="corse")


# ---- held-out images


def test_held_out_images_are_a_share_of_every_class():
    counts = [1, 2, 3, 10, 25, 500]
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), counts))
    records = ImageRecords("r", labels, tuple("abcdef"), paths=tuple(f"{k}" for k in range(len(labels))))
    fit, held = hold_out_images(records)
    assert np.bincount(held.labels, minlength=6).tolist() == [0, 1, 1, 1, 3, 50]
    assert fit.class_names == held.class_names == records.class_names
    for part in (fit, held):  # the numbering stays
        assert part.labels.tolist() == [labels[int(path)] for path in part.paths]
    assert sorted(fit.paths + held.paths, key=int) == list(records.paths)
    places = [list(np.flatnonzero(labels == 5)).index(int(p)) for p in held.paths if labels[int(p)] == 5]
    assert set(np.diff(places)) == {10}, "spread evenly, not cut off the end"
    assert hold_out_images(records).test.paths == held.paths
    half = hold_out_images(records, 0.999)
    assert np.bincount(half.train.labels, minlength=6).tolist() == [1] * 6, "each class keeps an image to train on"


def test_held_out_images_keep_numbers_of_classes_they_miss():
    records = ImageRecords("r", np.array([0, 1, 1, 2, 2]), tuple("abc"), paths=tuple("01234"))
    fit, held = hold_out_images(replace(records, query=np.zeros(5, bool), gallery=np.ones(5, bool)))
    assert held.labels.tolist() == [1, 2] and held.num_classes == fit.num_classes == 3
    assert held.query is None and held.gallery is None
    with pytest.raises(UserError, match="one image per class, so none can be held out; use --select last"):
        hold_out_images(records.select(np.array([0, 1, 3])))
    with pytest.raises(ValueError, match="share of 1.5"):
        hold_out_images(records, 1.5)


def test_a_selection_renumbers_only_where_asked():
    records = colours(12, 4)
    rows = np.flatnonzero(np.isin(records.labels, [1, 3]))
    assert set(records.select(rows).labels) == {0, 1} and records.select(rows).class_names == ("c1", "c3")
    kept = records.select(rows, renumber=False)
    assert set(kept.labels) == {1, 3} and kept.class_names == records.class_names
    named = records.with_classes(("c3", "new", "c1"))
    assert set(named.labels) == {0, 2} and named.class_names == ("c3", "new", "c1")
    np.testing.assert_array_equal(named.pixels, kept.pixels)
    assert records.with_classes(records.class_names) is records, "nothing to do costs no copy"


# ---- the augmentation of the CIFAR recipe


def test_training_views_are_reflected_padding_crops_and_flips():
    """Reflect-pad 4, a random 32 x 32 crop, a flip with probability one half: image by image, with numpy."""
    records = colours(300, 3)
    padded = np.pad(records.pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    loader = ImageLoader(records, Geometry(32), seed=5)
    seen = []
    for epoch in range(2):
        for batch in loader.train([np.arange(0, 200), np.arange(200, 300)], epoch):
            for index, image in zip(batch.indices.tolist(), batch.images.permute(0, 2, 3, 1).numpy(), strict=True):
                views = np.lib.stride_tricks.sliding_window_view(padded[index], (32, 32, 3))[:, :, 0]
                found = [
                    (*place, flip)
                    for flip in (False, True)
                    for place in np.argwhere((views == (image[:, ::-1] if flip else image)).all((2, 3, 4))).tolist()
                ]
                assert len(found) == 1
                seen += found
    top, left, flip = np.array(seen).T
    for corner in (top, left):  # nine places, each as likely: 66.7 of 600 expected, standard deviation 7.7
        counts = np.bincount(corner, minlength=9)
        assert len(counts) == 9 and counts.min() > 35 and counts.max() < 100
    assert abs(flip.mean() - 0.5) < 0.08 and abs(np.corrcoef([top, left, flip]) - np.eye(3)).max() < 0.15


def test_test_views_are_the_images_themselves():
    records = colours(7, 2)
    images = next(ImageLoader(records, Geometry(32)).test(7)).images
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), records.pixels)
