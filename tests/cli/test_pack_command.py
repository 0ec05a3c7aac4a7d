"""`metric-kd pack` and --pack: the same runs, and refusals in one sentence."""

import os

import h5py
import numpy as np
import pytest
from killing import Killed, history, kill_at, same
from tiny import TINY, write_images

from metric_kd.cli import dry_run
from metric_kd.cli import pack as command
from metric_kd.cli.main import main as metric_kd
from metric_kd.cli.parse import parse
from metric_kd.cli.train import main as train
from metric_kd.data import load_dataset
from metric_kd.engine.checkpoint import read_checkpoint


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", classes=4, per_class=6)


@pytest.fixture
def flags(data, tmp_path):
    """Flags of a run on the data, into a folder of its own."""
    return lambda name, *more: [*TINY, "--data", str(data), "--save_dir", str(tmp_path / name), *map(str, more)]


def refusal(arguments, capsys):
    assert metric_kd([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ") and text[-1] in ".?"
    return text


def packed(data, *more):
    return metric_kd(["pack", "--dataset", "folder", "--data", str(data), *map(str, more)])


def test_a_run_from_a_pack_is_the_run_from_the_files(data, flags, tmp_path, capsys):
    file = tmp_path / "p.h5"
    assert packed(data, "--input_size", 32, "--out", file) == 0
    said = capsys.readouterr().out
    assert "24 images of 32 x 32 px (pixels)" in said and f"--pack {file}" in said
    train(flags("plain"))
    assert metric_kd(["train", *flags("packed", "--pack", file)]) == 0
    assert f"images come from {file}" in capsys.readouterr().out
    assert same(tmp_path / "plain", tmp_path / "packed")
    assert history(tmp_path / "plain") == history(tmp_path / "packed")
    assert "pack" not in str(read_checkpoint(tmp_path / "plain" / "last.pth")["environment"])


def test_a_run_goes_on_with_a_pack_or_without_one(data, flags, tmp_path, monkeypatch):
    train(flags("plain"))
    for name, before, after in (("one", [], ["--pack", "auto"]), ("two", ["--pack", "auto"], [])):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(6, patch)
            train(flags(name, "--save_minutes", 0, *before))
        train(flags(name, "--save_minutes", 0, *after))
        assert same(tmp_path / "plain", tmp_path / name)


def test_auto_makes_packs_beside_the_data_and_renews_them(data, flags, tmp_path, capsys):
    file = data / ".packs" / "folder-32.h5"
    dry_run._one_step("train", flags("dry", "--pack", "auto", "--dry_run"))
    assert not file.exists(), "a trial writes nothing"
    train(flags("run", "--pack", "auto"))
    assert f"images come from {file}" in capsys.readouterr().out
    with h5py.File(file) as content:
        assert len(content["paths"]) == 24, "all images, for whatever task comes next"
    made = file.stat().st_mtime_ns
    run = tmp_path / "run"
    assert metric_kd(["eval", str(run), "--pack", "auto"]) == 0
    assert file.stat().st_mtime_ns == made
    write_images(data / "more", classes=1, per_class=3, seed=5)
    os.rename(data / "more" / "class00", data / "class09")
    os.rmdir(data / "more")
    assert metric_kd(["eval", str(run), "--pack", "auto"]) == 0
    with h5py.File(file) as content:
        assert len(content["paths"]) == 27
    assert packed(data, "--input_size", 32) == 0 and "read it with --pack auto" in capsys.readouterr().out


def test_analyse_reads_packs_for_both_networks(data, flags, tmp_path, capsys):
    train(flags("student"))
    train(flags("teacher", "--input_size", 40))
    both = ["analyse", str(tmp_path / "student"), "--against", str(tmp_path / "teacher")]
    reports = []
    for more in ([], ["--pack", "auto"]):
        assert metric_kd([*both, *more]) == 0
        reports.append((tmp_path / "student" / "analysis.json").read_text())
    assert reports[0] == reports[1]
    assert sorted(p.name for p in (data / ".packs").iterdir()) == ["folder-32.h5", "folder-46.h5"]
    assert f"images come from {data}/.packs/folder-32.h5" in capsys.readouterr().out
    assert "32 px and 46 px are needed" in refusal([*both, "--pack", data / ".packs" / "folder-32.h5"], capsys)


def test_stale_and_missing_packs_are_refused(data, flags, tmp_path, capsys):
    file = tmp_path / "p.h5"
    packed(data, "--side", 40, "--out", file)
    said = refusal(["train", *flags("run", "--pack", file)], capsys)
    assert "40 px and 32 px are needed" in said
    file.unlink()
    packed(data, "--side", 32, "--out", file)
    write_images(tmp_path / "other", classes=1, per_class=1, seed=9)
    os.replace(tmp_path / "other" / "class00" / "00.png", data / "class01" / "02.png")
    said = refusal(["train", *flags("run", "--pack", file)], capsys)
    assert "02.png has changed since" in said and "metric-kd pack" in said
    assert "no.h5 does not exist; make a file" in refusal(
        ["train", *flags("run", "--pack", tmp_path / "no.h5")], capsys
    )
    assert not (tmp_path / "run").exists()


def test_jpeg_packs_must_be_asked_for_and_belong_to_the_run(data, flags, tmp_path, capsys, monkeypatch):
    file = tmp_path / "p.h5"
    assert packed(data, "--side", 32, "--out", file, "--jpeg", 90) == 0
    assert "not bit-equal" in capsys.readouterr().out
    said = refusal(["train", *flags("run", "--pack", file)], capsys)
    assert "say --pack_jpeg 90" in said and not (tmp_path / "run").exists()
    assert "say --pack_jpeg 90" in refusal(["train", *flags("run", "--pack", file, "--pack_jpeg", 80)], capsys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(6, patch)
        train(flags("run", "--save_minutes", 0, "--pack", file, "--pack_jpeg", 90))
    said = refusal(["train", *flags("run", "--save_minutes", 0)], capsys)
    assert "pack_jpeg 90, this one has None" in said
    assert metric_kd(["train", *flags("run", "--save_minutes", 0, "--pack", file, "--pack_jpeg", 90)]) == 0
    exact = tmp_path / "q.h5"
    packed(data, "--side", 32, "--out", exact)
    assert "leave --pack_jpeg out" in refusal(["train", *flags("x", "--pack", exact, "--pack_jpeg", 90)], capsys)


def test_all_tasks_find_their_images_in_one_pack(tmp_path):
    """With a part to train on and one to test on, an embedding uses half of each."""
    for part in ("train", "test"):
        write_images(tmp_path / "data" / part, classes=4, per_class=2, seed=len(part))
    found = {path for records in command.every_image("folder", str(tmp_path / "data")) for path in records.paths}
    assert len(found) == 16
    embedding = load_dataset("folder", str(tmp_path / "data"))
    assert len(embedding.train) + len(embedding.test) == 8


def test_bad_flags(data, capsys, tmp_path):
    def refused(*arguments):
        return refusal(["pack", "--dataset", "folder", "--data", data, *arguments], capsys)

    assert "leave one of them out" in refused("--side", 40, "--input_size", 32)
    for flag, value in (("--side", 4), ("--input_size", 0), ("--workers", 0)):
        assert f"{flag} is {value}" in refused(flag, value)
    assert "--jpeg is 101" in refused("--jpeg", 101)
    assert "see --help" in refused("--side", "large")
    assert "does not exist" in refusal(["pack", "--dataset", "folder", "--data", tmp_path / "no"], capsys)
    assert "did you mean 'folder'" in refusal(["pack", "--dataset", "foler", "--data", data], capsys)
    assert "--pack FILE or auto" in refusal(["train", *TINY, "--data", data, "--pack_jpeg", 90], capsys)
    assert "--pack_jpeg is 0" in refusal(["train", *TINY, "--data", data, "--pack", "auto", "--pack_jpeg", 0], capsys)
    assert parse("train", ["--pack", "auto"]).config.pack == "auto"


def test_images_in_memory_need_no_pack(tmp_path, capsys, monkeypatch):
    from metric_kd.data.records import DATASETS, ImageRecords, split_by_class

    pixels = np.zeros((8, 32, 32, 3), np.uint8)
    records = ImageRecords("toy", np.arange(8) % 4, tuple("abcd"), pixels=pixels)
    monkeypatch.setitem(DATASETS._entries, "toy", lambda root, train_classes=None: split_by_class(records))
    assert "in memory already" in refusal(["pack", "--dataset", "toy", "--data", tmp_path], capsys)
    run = [*TINY, "--dataset", "toy", "--data", tmp_path, "--batch", 4, "--num_image_per_class", 2]
    (tmp_path / "p.h5").write_bytes(b"")
    said = refusal(["train", *run, "--save_dir", tmp_path / "x", "--pack", tmp_path / "p.h5"], capsys)
    assert "leave --pack out" in said
    assert metric_kd([str(a) for a in ["train", *run, "--save_dir", tmp_path / "x", "--pack", "auto"]]) == 0
    assert "without a pack" in capsys.readouterr().out
