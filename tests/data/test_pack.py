"""Packs: the same batches as from the files, whole or not there at all, and refused where the files have changed."""

import errno
import itertools
import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mortal import attempt, fork

from metric_kd.data import ImageLoader, ImageRecords, pack_part
from metric_kd.data import pack as pack_module
from metric_kd.data.decode import decode
from metric_kd.data.pack import NoPack, Pack, StalePack
from metric_kd.data.packing import AutoPack, make_pack
from metric_kd.data.transforms import Geometry, resize
from metric_kd.errors import UserError

BATCHES = [np.array([3, 1, 4]), np.array([11, 5, 9]), np.array([2, 6])]


@pytest.fixture
def files(tmp_path, picture):
    """Twelve files of several shapes and kinds in four classes."""
    paths = [tmp_path / "images" / "abcd"[k % 4] / f"{k:02d}.{'png' if k % 3 else 'jpg'}" for k in range(12)]
    for k, path in enumerate(paths):
        picture(path, (90 + 5 * k, 120 - 3 * k), seed=k, mode="L" if k == 5 else "RGB")
    decode(str(paths[0]))  # children of this process need not load the library then
    return ImageRecords("files", np.arange(12) % 4, ("a", "b", "c", "d"), paths=tuple(map(str, paths)))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(pack_part, "BLOCK", 2)


def oracle(records, side=110):
    return np.stack([resize(decode(p)[None], side)[0].permute(1, 2, 0).numpy() for p in records.paths])


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or (torch.equal(x, y) and x.stride() == y.stride())


def test_the_file_holds_what_it_says(files, tmp_path):
    halves = [files.select(np.arange(0, 12, 2)), files.select(np.arange(12))]
    pack = make_pack(tmp_path / "p.h5", halves, 110)
    with h5py.File(tmp_path / "p.h5") as content:
        order = [*range(0, 12, 2), *range(1, 12, 2)]
        np.testing.assert_array_equal(content["images"][()], oracle(files)[order])
        names = [name.decode() for name in content["class_names"][()]]
        assert [names[label] for label in content["labels"]] == ["abcd"[k % 4] for k in order]
        found = [name.decode() for name in content["paths"]]
        assert found == [os.path.relpath(files.paths[k], tmp_path / "images") for k in order]
        assert content["images"].chunks is None and content["images"].compression is None
        assert (
            content.attrs["side"] == 110
            and content.attrs["dataset"] == "files"
            and "torch" in content.attrs["versions"]
        )
    assert len(pack) == 12 and pack.quality is None and pack.readable.all()
    assert sorted(os.listdir(tmp_path)) == ["images", "p.h5"], "nothing else is left"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "geometry",
    [Geometry(96), Geometry(48, 96), Geometry(64), Geometry(100, resize=100)],
    ids=["96", "two", "64", "whole"],
)
def test_batches_are_those_of_the_files(files, tmp_path, geometry, workers):
    pack = make_pack(tmp_path / "p.h5", [files], geometry.side)
    for records in (files, files.select(np.array([7, 3, 0, 11, 4, 5, 6, 1, 9, 2, 10, 8]))):
        plain = ImageLoader(records, geometry, seed=3)
        packed = ImageLoader(records, geometry, seed=3, workers=workers, pack=pack)
        assert packed.pack is pack and packed.side == plain.side and plain.pack is None
        for epoch in (0, 1):
            same(plain.train(BATCHES, epoch), packed.train(BATCHES, epoch))
        same(plain.test(5), packed.test(5))
        same([plain.example(2)], [packed.example(2)])
        packed.close()


def test_files_of_the_size_of_the_crop_are_not_scaled(tmp_path, picture):
    paths = [tmp_path / f"{k}.png" for k in range(12)]
    for k, path in enumerate(paths):
        picture(path, (32, 32), seed=k)
    records = ImageRecords("files", np.arange(12) % 2, ("a", "b"), paths=tuple(map(str, paths)))
    pack = make_pack(tmp_path / "p.h5", [records], 32)
    plain, packed = ImageLoader(records, Geometry(32)), ImageLoader(records, Geometry(32), pack=pack)
    same(plain.train(BATCHES, 1), packed.train(BATCHES, 1))
    with pytest.raises(StalePack, match="37 px and 32 px are needed"):
        ImageLoader(records, Geometry(32), pack=make_pack(tmp_path / "q.h5", [records], 37))


def test_a_part_of_the_data_and_moved_data_are_found(files, tmp_path, monkeypatch):
    pack = make_pack(tmp_path / "p.h5", [files], 110)
    part = files.select(np.array([8, 4, 0]))
    same(ImageLoader(part, Geometry(96)).test(2), ImageLoader(part, Geometry(96), pack=pack).test(2))
    expected = list(ImageLoader(part, Geometry(96)).test(2))
    shutil.move(tmp_path / "images", tmp_path / "else where")
    shutil.move(tmp_path / "p.h5", tmp_path / "q.h5")
    monkeypatch.chdir(tmp_path)
    moved = tuple(p.replace(str(tmp_path / "images"), "else where") for p in part.paths)
    records = ImageRecords("files", part.labels, part.class_names, paths=moved)
    same(expected, ImageLoader(records, Geometry(96), pack=Pack("q.h5")).test(2))


def whole_or_refused(file, expected):
    """Whatever name it may get: what can be opened is right in every row."""
    try:
        pack = Pack(file)
    except (StalePack, NoPack):
        return
    assert all(np.array_equal(pack.image(row), image) for row, image in enumerate(expected))


@pytest.mark.parametrize("quality", [None, 90])
def test_killed_at_any_moment_it_goes_on_and_is_never_taken_for_whole(files, tmp_path, small_blocks, quality):
    files = files.select(np.arange(3))
    whole = make_pack(tmp_path / "whole.h5", [files], 40, quality=quality)
    expected = [whole.image(row).copy() for row in range(3)]
    file, part = tmp_path / "p.h5", tmp_path / "p.h5.part"
    for moment in itertools.count(1):
        status = attempt(lambda: make_pack(file, [files], 40, quality=quality, workers=1), kill_at=moment)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), "it died of something else"
        for name in (file, part):
            whole_or_refused(name, expected)
        pack = make_pack(file, [files], 40, quality=quality)
        assert all(np.array_equal(pack.image(row), image) for row, image in enumerate(expected))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "p.h5", "whole.h5"]
        file.unlink()
    assert moment > 14, "the writes are not counted any more"


def test_many_kills_in_a_row_lose_no_more_than_a_block(files, tmp_path, small_blocks, monkeypatch):
    file = tmp_path / "p.h5"
    kills = 0
    while attempt(lambda: make_pack(file, [files], 40, workers=1), kill_at=8) != 0:
        kills += 1
        assert kills < 20
    assert kills >= 3
    np.testing.assert_array_equal(Pack(file).pixels, oracle(files, 40))
    file.unlink()
    assert attempt(lambda: make_pack(file, [files], 40, workers=1), kill_at=12)
    done = written(tmp_path / "p.h5.part")
    assert 4 <= done < 12
    read = []
    real = pack_part.decode_resized
    monkeypatch.setattr(pack_part, "decode_resized", lambda path, side: read.append(path) or real(path, side))
    make_pack(file, [files], 40, workers=1)
    assert read == list(files.paths[done:]), "what was written is not decoded again"


def written(part):
    with h5py.File(part) as content:
        return int(content["written"][0])


def test_an_unfinished_pack_of_other_files_is_not_continued(files, tmp_path, small_blocks, picture):
    file = tmp_path / "p.h5"
    assert attempt(lambda: make_pack(file, [files], 40), kill_at=14)
    assert written(tmp_path / "p.h5.part") > 0
    picture(tmp_path / "images" / "a" / "00.jpg", (50, 60), seed=99)
    np.testing.assert_array_equal(make_pack(file, [files], 40).pixels, oracle(files, 40))


def test_two_processes_make_one_pack(files, tmp_path, small_blocks):
    file = tmp_path / "p.h5"
    children = []
    for _ in range(2):
        child = fork()
        if child == 0:
            try:
                make_pack(file, [files], 40)
                os._exit(0)
            except BaseException:
                os._exit(1)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    np.testing.assert_array_equal(Pack(file).pixels, oracle(files, 40))
    assert sorted(os.listdir(tmp_path)) == ["images", "p.h5"]


def refusal(file, paths, side=110, kind=StalePack):
    with pytest.raises(kind) as caught:
        Pack(file).of(paths, side)
    text = str(caught.value)
    assert type(caught.value) is kind and "\n" not in text and text.endswith(".")
    return text


def test_stale_packs_are_refused_with_the_reason(files, tmp_path, picture):
    file = tmp_path / "p.h5"
    make_pack(file, [files], 110)
    text = refusal(file, files.paths, side=256)
    assert "110 px and 256 px are needed" in text and "metric-kd pack --side 256" in text
    new, elsewhere = tmp_path / "images" / "e" / "new.png", tmp_path / "elsewhere" / "x.png"
    picture(new, seed=50)
    picture(elsewhere)
    assert "new.png is not in" in refusal(file, [*files.paths, str(new)])
    assert "a pack of files" in refusal(file, [str(elsewhere)])
    state = os.stat(files.paths[7])
    picture(tmp_path / "images" / "d" / "07.png", (125, 99), seed=70)
    text = refusal(file, files.paths)
    assert "07.png has changed since" in text and "metric-kd pack" in text
    picture(tmp_path / "images" / "d" / "07.png", (120, 99), seed=7)
    os.utime(files.paths[7], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(files.paths[7]).st_size != state.st_size
    assert "07.png has changed since" in refusal(file, files.paths), "by its size, where the time is the same"
    np.testing.assert_array_equal(make_pack(file, [files], 110).pixels, oracle(files))
    os.unlink(files.paths[0])
    assert "00.jpg (No such file" in refusal(file, files.paths, kind=UserError)


def test_other_and_damaged_files_are_refused_and_not_replaced(files, tmp_path, picture):
    file = tmp_path / "p.h5"
    make_pack(file, [files], 40)
    with pytest.raises(UserError, match="pack of pixels at 40 px"):
        make_pack(file, [files], 48)
    with pytest.raises(UserError, match="pack of pixels at 40 px"):
        make_pack(file, [files], 40, quality=90)
    with pytest.raises(UserError, match="a pack of files, not of others"):
        make_pack(file, [ImageRecords("others", files.labels, files.class_names, paths=files.paths)], 40)
    whole = file.read_bytes()
    picture(tmp_path / "elsewhere" / "x.png", (50, 50), seed=1)
    with pytest.raises(UserError, match="is a pack of other images"):
        make_pack(
            file, [ImageRecords("files", np.zeros(1, int), ("a",), paths=(str(tmp_path / "elsewhere" / "x.png"),))], 40
        )
    assert file.read_bytes() == whole
    file.write_bytes(whole[: len(whole) // 2])
    assert "p.h5 is no pack, or was damaged" in refusal(file, files.paths, 40, NoPack)
    with pytest.raises(NoPack):
        make_pack(file, [files], 40)
    file.write_bytes(b"my diary")
    assert "move this one away" in refusal(file, files.paths, 40, NoPack)
    with h5py.File(file, "w") as content:
        content["something"] = 1
    assert "no pack of format" in refusal(file, files.paths, 40, NoPack)
    file.write_bytes(whole)
    with h5py.File(file, "r+") as content:
        pixels = content["images"][()]
        del content["images"]
        content.create_dataset("images", data=pixels, chunks=(1, 40, 40, 3), compression="lzf")
    assert "not contiguous" in refusal(file, files.paths, 40, NoPack)


def test_other_libraries_are_noticed_where_they_read_other_bits(files, tmp_path, monkeypatch):
    file = tmp_path / "p.h5"
    make_pack(file, [files], 110)
    monkeypatch.setattr(pack_module, "versions", lambda: {"torch": "99"})
    assert len(Pack(file).of(files.paths, 110).rows) == 12, "the same bits"
    monkeypatch.setattr(pack_module, "decode_resized", lambda path, side: oracle(files)[0] ^ 1)
    assert f"made with torch {torch.__version__}, and 99 reads" in refusal(file, files.paths)


def test_unreadable_files_are_named_or_marked(files, tmp_path):
    file = tmp_path / "p.h5"
    open(files.paths[6], "wb").close()
    with pytest.raises(UserError, match="06.jpg"):
        make_pack(file, [files], 110)
    assert os.listdir(tmp_path) == ["images"], "its first bytes show it before anything is written"
    with open(files.paths[3], "rb+") as damaged:
        damaged.truncate(200)
    pack = make_pack(file, [files], 110, skip_unreadable=True)
    assert np.flatnonzero(~pack.readable).tolist() == [3, 6]
    plain = ImageLoader(files, Geometry(96), skip_unreadable=True)
    packed = ImageLoader(files, Geometry(96), skip_unreadable=True, pack=pack)
    assert packed.skipped == plain.skipped and len(packed) == 10
    same(plain.test(4), packed.test(4))
    same(plain.train([np.array([9, 2, 5])], 1), packed.train([np.array([9, 2, 5])], 1))
    with pytest.raises(UserError, match="cannot read the image .*03.jpg"):
        ImageLoader(files, Geometry(96), pack=pack)
    with pytest.raises(UserError, match="cannot read the image .*03.jpg"):
        make_pack(file, [files], 110)
    with pytest.raises(UserError, match="none of the 2 images"):
        ImageLoader(files.select(np.array([3, 6])), Geometry(96), skip_unreadable=True, pack=pack)


def test_a_file_that_can_be_read_again_is_noticed(files, tmp_path):
    """As one whose permission was mended: its size and time are those with which it could not be read."""
    file, whole = tmp_path / "p.h5", Path(files.paths[4]).read_bytes()
    state = os.stat(files.paths[4])

    def filled(content):
        with open(files.paths[4], "wb") as damaged:
            damaged.write(content)
        os.utime(files.paths[4], ns=(state.st_atime_ns, state.st_mtime_ns))

    filled(bytes(len(whole)))
    auto = AutoPack(tmp_path, "p", lambda: [files], skip_unreadable=True)
    assert ImageLoader(files, Geometry(96), skip_unreadable=True, pack=auto).skipped == [files.paths[4]]
    strict = AutoPack(tmp_path, "p", lambda: [files])
    with pytest.raises(UserError, match="04.png"):
        ImageLoader(files, Geometry(96), pack=strict)
    with pytest.raises(UserError, match=r"04.png \(it could not be when .*p-110.h5 was made\)"):
        ImageLoader(files, Geometry(96), pack=Pack(tmp_path / "p-110.h5"))
    others = files.select(np.array([0, 1, 2]))
    assert len(ImageLoader(others, Geometry(96), pack=strict)) == 3, "a part without it needs no other pack"
    filled(whole)
    assert make_pack(file, [files], 110).readable.all()
    assert ImageLoader(files, Geometry(96), pack=strict).pack.readable.all()


def test_names_need_not_be_utf8(files, tmp_path):
    folder = os.fsencode(tmp_path) + b"/cl\xff"
    os.mkdir(folder)
    name = os.fsdecode(folder + b"/\xfe.png")
    shutil.copy(files.paths[1], name)
    records = ImageRecords("odd", np.array([1, 0]), (os.fsdecode(b"cl\xff"), "b"), paths=(files.paths[1], name))
    pack = make_pack(tmp_path / "p.h5", [records], 40)
    assert pack.of([name], 40).rows.tolist() == [1] and len(records.fingerprint()) == 16
    with h5py.File(tmp_path / "p.h5") as content:
        assert content["class_names"][1] == b"cl\xff"


def test_places_where_no_pack_can_be(files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a folder; give a file"):
        make_pack(tmp_path, [files], 40)
    for place in (tmp_path / "images" / "a" / "00.jpg" / "p.h5", Path("/proc/p.h5"), Path("/proc/self/a/p.h5")):
        with pytest.raises(UserError, match=r"cannot write .*; make the pack elsewhere \(metric-kd pack --out FILE\)"):
            make_pack(place, [files], 40)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        make_pack(tmp_path / "packs" / "p.h5", [files], 40)


def test_a_file_that_shows_late_that_it_is_damaged_keeps_what_was_done(files, tmp_path, small_blocks):
    with open(files.paths[9], "rb+") as damaged:
        damaged.truncate(300)
    with pytest.raises(UserError, match="09.jpg"):
        make_pack(tmp_path / "p.h5", [files], 110)
    assert written(tmp_path / "p.h5.part") == 8 and not (tmp_path / "p.h5").exists()


def test_jpeg_images_are_those_of_the_encoder(files, tmp_path):
    from torchvision.io import decode_jpeg, encode_jpeg

    pack = make_pack(tmp_path / "p.h5", [files], 110, quality=90)
    assert pack.quality == 90
    for row, image in enumerate(oracle(files)):
        expected = decode_jpeg(encode_jpeg(torch.from_numpy(image).permute(2, 0, 1).contiguous(), 90))
        assert np.array_equal(pack.image(row), expected.permute(1, 2, 0).numpy())
    here, there = (ImageLoader(files, Geometry(96), seed=1, workers=n, pack=pack) for n in (0, 2))
    same(here.train(BATCHES, 1), there.train(BATCHES, 1))
    same(here.test(5), there.test(5))
    there.close()
    assert pack.file.stat().st_size < 12 * 110 * 110 * 3


@pytest.mark.parametrize("quality", [None, 90])
def test_a_full_disk_is_seen_before(files, tmp_path, monkeypatch, quality):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="needs 0.00 GiB and .* free; make room"):
        make_pack(tmp_path / "p.h5", [files], 110, quality=quality)
    assert os.listdir(tmp_path) == ["images"]


def test_no_file_of_the_library_stays_open_and_pickles_are_small(files, tmp_path):
    pack = make_pack(tmp_path / "p.h5", [files], 110)
    assert pack.pixels.shape == (12, 110, 110, 3) and not pack.pixels.flags.writeable
    kinds = h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET | h5py.h5f.OBJ_GROUP | h5py.h5f.OBJ_ATTR
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, kinds) == 0
    data = pickle.dumps(pack)
    assert len(data) < 5000, "the pixels do not travel"
    np.testing.assert_array_equal(pickle.loads(data).pixels, oracle(files))


def test_auto_makes_a_pack_once_and_again_where_it_is_stale(files, tmp_path, picture):
    asked = []
    auto = AutoPack(tmp_path / "packs", "files", lambda: asked.append(1) or [files])
    expected = list(ImageLoader(files, Geometry(96)).test(5))
    for _ in range(2):
        loader = ImageLoader(files, Geometry(96), pack=auto)
        assert loader.pack.file == tmp_path / "packs" / "files-110.h5"
        same(expected, loader.test(5))
    assert len(asked) == 1
    picture(tmp_path / "images" / "d" / "07.png", (125, 99), seed=70)
    unwilling = AutoPack(tmp_path / "packs", "files", lambda: [files], make=False)
    assert ImageLoader(files, Geometry(96), pack=unwilling).pack is None
    renewed = ImageLoader(files, Geometry(96), pack=auto)
    same(ImageLoader(files, Geometry(96)).test(5), renewed.test(5))
    assert len(asked) == 2
    ImageLoader(files, Geometry(48), pack=auto)
    assert sorted(os.listdir(tmp_path / "packs")) == ["files-110.h5", "files-55.h5"]
    assert AutoPack(tmp_path, "x", list, quality=95).file(256).name == "x-256-jpeg95.h5"


def test_wrong_arguments(files, tmp_path):
    for options in ({"side": 4}, {"side": 40, "workers": 0}, {"side": 40, "quality": 0}, {"side": 40, "quality": 101}):
        with pytest.raises(UserError, match="a pack takes"):
            make_pack(tmp_path / "p.h5", [files], **options)
    pixels = ImageRecords("small", np.zeros(2, int), ("a",), pixels=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="in memory already"):
        make_pack(tmp_path / "p.h5", [pixels], 40)
    with pytest.raises(UserError, match="in memory already"):
        ImageLoader(pixels, Geometry(32), pack=AutoPack(tmp_path, "small", list))
    with pytest.raises(UserError, match="no images to pack"):
        make_pack(tmp_path / "p.h5", [files.select(np.zeros(12, bool))], 40)
