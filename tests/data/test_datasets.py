"""The published collections, as tiny fakes that come over the loopback server."""

import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from metric_kd.data import DATASETS, ImageLoader, cars196, cifar, cub200, load_dataset, omniglot, stanford
from metric_kd.data.transforms import Geometry
from metric_kd.errors import UserError

REAL = os.environ.get("METRIC_KD_TEST_DATA")
real = pytest.mark.skipif(not REAL, reason="METRIC_KD_TEST_DATA names no folder with real data")


def image_bytes(seed, kind="JPEG", side=20):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def tgz(entries):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zipped(entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return stream.getvalue()


def md5(data):
    return hashlib.md5(data).hexdigest()


def unpack(root, entries):
    for name, content in entries.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def serve(server, source, body):
    """The same source, with its file on the loopback server."""
    server.files[f"/{source.file}"] = body
    return replace(source, md5=md5(body), urls=("http://127.0.0.1:1/dead", server.url(f"/{source.file}")))


# ---- CUB-200-2011: 4 classes of 3 images, the ids not in the order of the file


def cub_files():
    names = [f"{c:03d}.Bird_{c}/bird_{k}.jpg" for c in (1, 2, 3, 4) for k in range(3)]
    images = "".join(f"{i + 1} {name}\n" for i, name in reversed(list(enumerate(names))))
    labels = "".join(f"{i + 1} {i // 3 + 1}\n" for i in range(12))
    files = {"CUB_200_2011/images.txt": images.encode(), "CUB_200_2011/image_class_labels.txt": labels.encode()}
    files.update({f"CUB_200_2011/images/{name}": image_bytes(i) for i, name in enumerate(names)})
    return {**files, "attributes.txt": b"stray"}


@pytest.fixture
def cub(server, monkeypatch):
    monkeypatch.setattr(cub200, "SOURCE", serve(server, cub200.SOURCE, tgz(cub_files())))
    monkeypatch.setattr(cub200, "IMAGES", 12)
    monkeypatch.setattr(cub200, "CLASSES", 4)


def check_cub(splits):
    assert splits.train.class_names == ("001.Bird_1", "002.Bird_2")
    assert splits.test.class_names == ("003.Bird_3", "004.Bird_4")
    assert splits.train.labels.tolist() == splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all(os.path.isfile(p) for p in splits.train.paths + splits.test.paths)
    assert splits.test.paths[0].endswith("003.Bird_3/bird_0.jpg")
    assert splits.train.flip and splits.train.mean is None


def test_cub200_from_the_archive_end_to_end(cub, server, tmp_path):
    splits = load_dataset("cub200", tmp_path / "data")
    check_cub(splits)
    assert sorted(os.listdir(tmp_path / "data")) == ["CUB_200_2011", "CUB_200_2011.tgz"]
    batch = next(ImageLoader(splits.test, Geometry(96)).test(4))
    assert batch.images.shape == (4, 3, 96, 96)
    check_cub(load_dataset("cub200", tmp_path / "data", download=False))
    check_cub(load_dataset("cub200", tmp_path / "data" / "CUB_200_2011", download=False))
    assert len(server.requests) == 1


def test_train_classes_by_number_and_by_name(cub, tmp_path):
    unpack(tmp_path, cub_files())
    assert load_dataset("cub200", tmp_path, train_classes=3).train.num_classes == 3
    splits = load_dataset("cub200", tmp_path, train_classes=["004.Bird_4", "001.Bird_1"])
    assert splits.train.class_names == ("001.Bird_1", "004.Bird_4")
    for wrong in (4, 0, -1, ["no such bird"]):
        with pytest.raises(UserError, match="train_classes"):
            load_dataset("cub200", tmp_path, train_classes=wrong)


def test_an_archive_that_lies_there_is_unpacked(cub, tmp_path, server):
    (tmp_path / "CUB_200_2011.tgz").write_bytes(server.files["/CUB_200_2011.tgz"])
    check_cub(load_dataset("cub200", tmp_path, download=False))


def test_missing_data_say_what_to_put_where(tmp_path):
    for name, file in (("cub200", "CUB_200_2011.tgz"), ("stanford", "Stanford_Online_Products.zip")):
        with pytest.raises(UserError) as caught:
            load_dataset(name, tmp_path, download=False)
        assert f"put this file here: {tmp_path / file}" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_the_edition_of_2010_is_noticed(monkeypatch, tmp_path):
    files = {f"images/{c:03d}.Bird/{k}.jpg": b"x" for c in (1, 2) for k in range(3)}
    unpack(tmp_path / "CUB_200", files)
    with pytest.raises(UserError, match="no images.txt"):
        load_dataset("cub200", tmp_path)
    monkeypatch.setattr(cub200, "IMAGES_2010", 6)
    for root in (tmp_path, tmp_path / "CUB_200"):
        with pytest.raises(UserError, match="CUB-200 of 2010"):
            load_dataset("cub200", root)


def test_wrong_counts_and_broken_lists_are_noticed(cub, monkeypatch, tmp_path):
    unpack(tmp_path, cub_files())
    monkeypatch.setattr(cub200, "IMAGES", 11_788)
    with pytest.raises(UserError, match="12 images in 4 classes where CUB-200-2011 has 11,788 in 4"):
        load_dataset("cub200", tmp_path)
    monkeypatch.setattr(cub200, "IMAGES_2010", 12)
    with pytest.raises(UserError, match="CUB-200 of 2010"):
        load_dataset("cub200", tmp_path)
    labels = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    labels.write_text(labels.read_text().split("\n", 1)[1])
    with pytest.raises(UserError, match="disagree"):
        load_dataset("cub200", tmp_path)
    labels.write_text("rubbish")
    with pytest.raises(UserError, match="not the list"):
        load_dataset("cub200", tmp_path)
    labels.unlink()
    with pytest.raises(UserError, match="cannot read"):
        load_dataset("cub200", tmp_path)


# ---- Cars-196: 4 models of 2 images


def cars_annotations(classes=(1, 1, 2, 2, 3, 3, 4, 4)):
    from scipy.io import savemat

    kind = [(n, object) for n in ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")]
    rows = np.zeros((1, len(classes)), dtype=kind)
    for k, c in enumerate(classes):
        rows[0, k] = (f"car_ims/{k + 1:06d}.jpg", 1, 1, 9, 9, c, k % 2)
    names = np.array([[f"Model {c}" for c in range(1, 5)]], dtype=object)
    stream = io.BytesIO()
    savemat(stream, {"annotations": rows, "class_names": names})
    return stream.getvalue()


@pytest.fixture
def cars(server, monkeypatch):
    pictures = tgz({f"car_ims/{k + 1:06d}.jpg": image_bytes(k) for k in range(8)})
    monkeypatch.setattr(cars196, "PICTURES", serve(server, cars196.PICTURES, pictures))
    monkeypatch.setattr(cars196, "ANNOTATIONS", serve(server, cars196.ANNOTATIONS, cars_annotations()))
    monkeypatch.setattr(cars196, "IMAGES", 8)
    monkeypatch.setattr(cars196, "CLASSES", 4)


def check_cars(splits):
    assert splits.train.class_names == ("Model 1", "Model 2") and splits.test.class_names == ("Model 3", "Model 4")
    assert splits.test.labels.tolist() == [0, 0, 1, 1]
    assert [os.path.basename(p) for p in splits.test.paths] == [f"{k:06d}.jpg" for k in (5, 6, 7, 8)]
    assert all(os.path.isfile(p) for p in splits.train.paths)


def test_cars196_from_its_two_files_end_to_end(cars, server, tmp_path):
    check_cars(load_dataset("cars196", tmp_path))
    check_cars(load_dataset("cars196", tmp_path, download=False))
    assert len(server.requests) == 2
    os.rename(tmp_path, tmp_path.with_name("cars196"))
    check_cars(load_dataset("cars196", tmp_path.parent, download=False))


def test_cars196_by_hand_and_its_errors(cars, server, monkeypatch, tmp_path):
    (tmp_path / "car_ims.tgz").write_bytes(server.files["/car_ims.tgz"])
    with pytest.raises(UserError, match=f"put this file here: {tmp_path / 'cars_annos.mat'}"):
        load_dataset("cars196", tmp_path, download=False)
    (tmp_path / "cars_annos.mat").write_bytes(b"no matlab file")
    with pytest.raises(UserError, match="not the annotation file"):
        load_dataset("cars196", tmp_path, download=False)
    (tmp_path / "cars_annos.mat").write_bytes(cars_annotations((1, 1, 2, 2, 3, 3)))
    with pytest.raises(UserError, match="6 images in 3 classes where Cars-196 has 8 in 4"):
        load_dataset("cars196", tmp_path, download=False)
    (tmp_path / "other" / "cars_train").mkdir(parents=True)
    with pytest.raises(UserError, match="by train and test"):
        load_dataset("cars196", tmp_path / "other")


# ---- Stanford Online Products: 3 training products, 2 test products


def sop_files():
    header = b"image_id class_id super_class_id path\n"
    rows = [(k + 1, c, f"bicycle_final/{c}_{k}.JPG") for k, c in enumerate((1, 1, 2, 3, 3, 4, 4, 5))]
    lists = [b"".join(f"{i} {c} 1 {p}\n".encode() for i, c, p in rows if (c <= 3) == first) for first in (True, False)]
    files = {f"Ebay_{part}.txt": header + rows for part, rows in zip(("train", "test"), lists, strict=True)}
    files.update({p: image_bytes(i) for i, _, p in rows})
    return {f"Stanford_Online_Products/{name}": content for name, content in files.items()}


@pytest.fixture
def sop(server, monkeypatch):
    body = zipped({**sop_files(), "__MACOSX/._x": b""})
    monkeypatch.setattr(stanford, "SOURCE", serve(server, stanford.SOURCE, body))
    monkeypatch.setattr(stanford, "TRAIN", (5, 3))
    monkeypatch.setattr(stanford, "TEST", (3, 2))


def test_stanford_follows_its_two_lists(sop, tmp_path):
    for download in (True, False):
        splits = load_dataset("stanford", tmp_path, download=download)
        assert splits.train.labels.tolist() == [0, 0, 1, 2, 2] and splits.test.labels.tolist() == [0, 0, 1]
        assert splits.train.class_names == ("00001", "00002", "00003") and splits.test.class_names == ("00004", "00005")
        assert all(os.path.isfile(p) for p in splits.train.paths + splits.test.paths)
    assert load_dataset("sop", tmp_path, train_classes=3).train.labels.tolist() == splits.train.labels.tolist()
    assert load_dataset("sop", tmp_path, train_classes=4).train.num_classes == 4


def test_stanford_lists_are_checked(sop, monkeypatch, tmp_path):
    unpack(tmp_path, sop_files())
    monkeypatch.setattr(stanford, "TEST", (60_502, 11_316))
    with pytest.raises(UserError, match="3 images in 2 classes where the test part .* has 60,502 in 11,316"):
        load_dataset("stanford", tmp_path)
    for content in (b"", b"image_id class_id super_class_id path\n1 2\n"):
        (tmp_path / "Stanford_Online_Products" / "Ebay_train.txt").write_bytes(content)
        with pytest.raises(UserError, match="not a list"):
            load_dataset("stanford", tmp_path)


# ---- CIFAR: pickles and trees


def cifar_pickles(edition, classes, per_class=4):
    """Files like torchvision's; and the pixels and labels of train and test."""
    generator = np.random.default_rng(0)
    files, arrays = {}, []
    for part in (edition.train, edition.test):
        pixels, labels = [], []
        for name, _ in part:
            x = generator.integers(0, 256, (classes * per_class, 32, 32, 3), dtype=np.uint8)
            y = generator.permutation(np.repeat(np.arange(classes), per_class)).tolist()
            planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            files[name] = pickle.dumps({"data": planes, edition.label_key: y})
            pixels.append(x)
            labels += y
        arrays.append((np.concatenate(pixels), np.array(labels)))
    files[edition.meta[0]] = pickle.dumps({edition.names_key: [f"class{c:02d}" for c in range(classes)]})
    return files, arrays


def trusting(edition, files):
    def known(part):
        return tuple((name, md5(files[name])) for name, _ in part)

    return replace(edition, train=known(edition.train), test=known(edition.test), meta=known([edition.meta])[0])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_the_archive_end_to_end(name, server, monkeypatch, tmp_path):
    original = getattr(cifar, name.upper())
    files, ((x, y), (xt, yt)) = cifar_pickles(original, classes=6)
    edition = trusting(original, files)
    body = tgz({f"{edition.source.inner}/{n}": content for n, content in files.items()})
    monkeypatch.setattr(cifar, name.upper(), replace(edition, source=serve(server, edition.source, body)))
    for root in (tmp_path, tmp_path, tmp_path / edition.source.inner):
        splits = load_dataset(name, root)
        assert splits.train.class_names == ("class00", "class01", "class02")
        assert splits.test.class_names == ("class03", "class04", "class05")
        np.testing.assert_array_equal(splits.train.pixels, x[y < 3])
        np.testing.assert_array_equal(splits.train.labels, y[y < 3])
        np.testing.assert_array_equal(splits.test.pixels, xt[yt >= 3])
        np.testing.assert_array_equal(splits.test.labels, yt[yt >= 3] - 3)
    assert len(server.requests) == 1
    assert splits.train.mean == original.mean and splits.train.std == original.std


def test_a_foreign_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    files, _ = cifar_pickles(cifar.CIFAR100, classes=4)
    files["train"] = files["meta"] = pickle.dumps(Bomb())
    unpack(tmp_path / "cifar-100-python", files)
    with pytest.raises(UserError, match="is not opened"):
        load_dataset("cifar100", tmp_path)
    assert not (tmp_path / "exploded").exists()


def cifar_tree(root, side=32):
    pixels = {}
    for part, count in (("train", 3), ("test", 2)):
        for c in "abcd":
            for k in range(count):
                data = image_bytes(len(pixels), "PNG", side)
                unpack(root, {f"{part}/{c}/{k}.png": data})
                pixels[part, c, k] = np.asarray(Image.open(io.BytesIO(data)))
    return pixels


@pytest.mark.parametrize("below", [".", "cifar100"])
def test_cifar_as_a_tree(below, tmp_path):
    pixels = cifar_tree(tmp_path / below)
    splits = load_dataset("cifar100", tmp_path)
    assert splits.train.class_names == ("a", "b") and splits.test.class_names == ("c", "d")
    np.testing.assert_array_equal(splits.train.pixels, [pixels["train", c, k] for c in "ab" for k in range(3)])
    np.testing.assert_array_equal(splits.test.pixels, [pixels["test", c, k] for c in "cd" for k in range(2)])
    assert splits.test.paths is None and splits.test.mean == (0.5071, 0.4865, 0.4409)
    assert load_dataset("cifar100", tmp_path, train_classes=["d"]).train.class_names == ("d",)


def test_only_the_images_that_are_used_are_decoded(tmp_path):
    cifar_tree(tmp_path)
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"spoilt")
    load_dataset("cifar100", tmp_path)
    (tmp_path / "test" / "d" / "1.png").write_bytes(b"spoilt")
    with pytest.raises(UserError, match="cannot read the image .*1.png"):
        load_dataset("cifar100", tmp_path)


def test_cifar_images_have_32_pixels(tmp_path):
    cifar_tree(tmp_path, side=33)
    with pytest.raises(UserError, match="33 x 33 px where cifar10 has 32 x 32"):
        load_dataset("cifar10", tmp_path)


# ---- Omniglot


def characters(alphabets, prefix=""):
    return {
        f"{prefix}{alphabet}/character{c:02d}/{k}.png": image_bytes(c + 10 * k, "PNG", 21)
        for alphabet, count in alphabets.items()
        for c in range(1, count + 1)
        for k in range(2)
    }


def test_omniglot_published_layout_end_to_end(server, monkeypatch, tmp_path):
    for attribute, alphabets in (("BACKGROUND", {"Greek": 3, "Latin": 2}), ("EVALUATION", {"Aurek": 2})):
        source = getattr(omniglot, attribute)
        served = serve(server, source, zipped(characters(alphabets, f"{source.inner}/")))
        monkeypatch.setattr(omniglot, attribute, served)
    for root in (tmp_path, tmp_path, tmp_path / "omniglot-py"):
        splits = load_dataset("omniglot", root)
        assert splits.train.class_names[:3] == tuple(f"Greek/character0{k}" for k in (1, 2, 3))
        assert splits.train.num_classes == 5 and len(splits.train) == 10
        assert splits.test.class_names == ("Aurek/character01", "Aurek/character02")
        assert not splits.train.flip and not splits.test.flip and splits.train.mean == (0.92,) * 3
    assert len(server.requests) == 2
    assert load_dataset("omniglot", tmp_path, train_classes=3).train.class_names[0] == "Aurek/character01"


@pytest.mark.parametrize("below", [".", "omniglot", "omniglot_small"])
def test_omniglot_as_a_tree(below, tmp_path):
    unpack(tmp_path / below, characters({"Korean": 2, "Greek": 3}))
    (tmp_path / below / "LICENSE.txt").write_text("MIT")
    splits = load_dataset("omniglot", tmp_path)
    assert splits.train.class_names == ("Greek/character01", "Greek/character02")
    assert splits.test.class_names == ("Greek/character03", "Korean/character01", "Korean/character02")
    assert load_dataset("omniglot", tmp_path, train_classes=3).test.labels.tolist() == [0, 0, 1, 1]


def test_omniglot_missing(tmp_path):
    with pytest.raises(UserError, match="put this file here: .*images_background.zip"):
        load_dataset("omniglot", tmp_path, download=False)


# ---- all of them


def test_every_data_set_is_registered():
    expected = {
        "cub200",
        "cars196",
        "stanford",
        "cifar10",
        "cifar100",
        "omniglot",
        "folder",
        "table",
        "glyphs",
        "market1501",
    }
    assert expected <= set(DATASETS)


def test_unknown_names_and_options_get_a_suggestion(tmp_path):
    with pytest.raises(UserError, match="did you mean 'cifar100'"):
        load_dataset("cifar1000", tmp_path)
    with pytest.raises(UserError, match="did you mean 'flip'"):
        load_dataset("folder", tmp_path, flp=False)


@real
def test_real_cifar100():
    splits = load_dataset("cifar100", REAL)
    assert (len(splits.train), len(splits.test)) == (25_000, 5_000)
    assert splits.train.class_names[0] == "apple" and splits.test.class_names[0] == "mouse"
    images = splits.train.pixels.reshape(-1, 3) / 255.0
    assert abs(images.mean(0) - splits.train.mean).max() < 0.02 and abs(images.std(0) - splits.train.std).max() < 0.02


@real
def test_real_omniglot():
    splits = load_dataset("omniglot", REAL, train_classes=157)
    assert (len(splits.train), len(splits.test), splits.test.num_classes) == (3_140, 1_700, 85)
    assert {name.split("/")[0] for name in splits.test.class_names} == {"Latin", "Sanskrit", "Tagalog"}
    images = next(ImageLoader(splits.train, Geometry(64)).test(200)).images
    assert 0.8 < (images > 200).float().mean() < 0.97


@real
def test_real_birds():
    splits = load_dataset("folder", os.path.join(REAL, "birds"))
    assert (len(splits.train), len(splits.test)) == (148, 146)
    batches = [b.images for b in ImageLoader(splits.test, Geometry(224)).test(50)]
    assert [len(b) for b in batches] == [50, 50, 46] and batches[0].float().std() > 20
    with pytest.raises(UserError, match="put this file here"):
        load_dataset("cub200", os.path.join(REAL, "birds"), download=False)
