"""metric-kd quantify from flags to page: on classifiers and embeddings, stopped and resumed, refused in words."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny import THREADS, TINY, write_images

from metric_kd.cli import subjects
from metric_kd.cli.distill import main as distill
from metric_kd.cli.main import main as command
from metric_kd.cli.parse import parse
from metric_kd.cli.quantify import _default_out
from metric_kd.cli.quantify import main as quantify
from metric_kd.cli.train import main as train
from metric_kd.engine.checkpoint import read_checkpoint, restore_network, write_checkpoint
from metric_kd.engine.weight_record import read_distances
from metric_kd.errors import UserError
from metric_kd.models.layers import reading
from metric_kd.quantify import maps
from metric_kd.quantify.concepts import learning_simultaneity
from metric_kd.quantify.discarding import Search, information_discarding

QUICK = ["--grid", "4", "--count", "5", "--draws", "4", "--iterations", "8", "--threshold", "0.01", "--device", "cpu"]
CLASSIFY = ["--task", "classification", "--dataset", "folder", "--batch", "16", "--epochs", "3", "--lr", "0.02"]


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory) -> Path:
    """teacher, distilled and baseline: classifiers whose weights were recorded."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(int(THREADS))
    flags = [*CLASSIFY, "--data", str(image_folder), "--record_weights", "all", "--device", "cpu"]
    train([*flags, "--base", "resnet8_x0.5:stem_stride=2", "--save_dir", str(folder / "teacher")])
    student = [*flags, "--base", "resnet8_x0.25:stem_stride=2"]
    train([*student, "--save_dir", str(folder / "baseline")])
    taught = ["--teacher_load", str(folder / "teacher"), "--loss", "cross_entropy:1", "--loss", "st:1"]
    distill([*student, *taught, "--save_dir", str(folder / "distilled")])
    return folder


def three(runs: Path) -> list[str]:
    return [word for name in ("teacher", "distilled", "baseline") for word in (f"--{name}", str(runs / name))]


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_from_runs_to_the_page(runs, tmp_path, capsys):
    assert command(["quantify", *three(runs), "--layer", "conv", *QUICK, "--out", str(tmp_path / "q")]) == 0
    printed = capsys.readouterr().out
    assert "Concepts in the foreground, N_fg" in printed and "Images effective for both" in printed
    content = metrics(tmp_path / "q")
    assert [table["title"] for table in content["tables"]] == ["images effective for both", "all images"]
    everything = content["tables"][1]["metrics"]
    assert content["tables"][1]["images"] == 5
    assert everything["d_mean"]["teacher"] is None and everything["d_mean"]["expected"] == "less"
    assert everything["rho"]["held"] == (everything["rho"]["distilled"]["mean"] > everything["rho"]["baseline"]["mean"])
    assert content["curves"]["distilled"]["epochs"] == [0, 1, 2, 3] and len(content["curves"]["teacher"]["epochs"]) == 1
    page = Page((tmp_path / "q" / "quantify.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    addresses = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert addresses and all(address.startswith(("data:image/", "#")) for address in addresses)
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")


def test_maps_are_those_of_the_library_and_distances_those_of_the_record(runs, tmp_path):
    flags = ["--distilled", str(runs / "distilled"), "--layer", "conv", *QUICK, "--threshold", "0.01"]
    quantify([*flags, "--out", str(tmp_path / "q")])
    config = parse("quantify", flags).config
    networks = subjects.networks_of(config, [])
    images = subjects.images_of(config, networks, [])
    network = restore_network(runs / "distilled" / "weights" / "epoch0002.pth", None, {}).eval()
    with reading(network, "conv") as read:
        search = Search(grid=4, draws=4, iterations=8)
        found = information_discarding(read, images.views[32], search, scale=network.pixel_scale)
    with h5py.File(tmp_path / "q" / "maps.h5") as file:
        np.testing.assert_allclose(file["distilled/2/sigma"][()], found.sigma.numpy(), rtol=1e-6)
    record = read_distances(runs / "distilled" / "weights")
    moved = record["base.layer3.0.conv2.weight"]
    np.testing.assert_allclose(networks[0].distance, np.cumsum(moved.path) / moved.start)
    quantify([*flags, "--count", "1", "--out", str(tmp_path / "one")])
    content = metrics(tmp_path / "one")
    counts = np.array([content["curves"]["distilled"]["foreground"]])
    peak = learning_simultaneity(counts.astype(int), np.arange(4), networks[0].distance)
    assert content["tables"][1]["metrics"]["d_mean"]["distilled"]["mean"] == pytest.approx(peak.mean)


def test_stopped_and_resumed_gives_the_same(runs, tmp_path, monkeypatch):
    flags = [*three(runs), "--layer", "conv", *QUICK, "--epochs", "0,3", "--batch", "4"]
    monkeypatch.setattr(maps, "TOGETHER", 2)
    quantify([*flags, "--out", str(tmp_path / "whole")])
    search, calls = maps.information_discarding, []

    def counted(*arguments, **options):
        calls.append(options["keys"])
        if len(calls) == 8:
            raise KeyboardInterrupt
        return search(*arguments, **options)

    monkeypatch.setattr(maps, "information_discarding", counted)
    with pytest.raises(KeyboardInterrupt):
        quantify([*flags, "--out", str(tmp_path / "cut")])
    assert not (tmp_path / "cut" / "metrics.json").exists()
    quantify([*flags, "--out", str(tmp_path / "cut")])
    assert len(calls) == 8 + (15 - 7), "three calls for each of five checkpoints; seven were kept"
    assert metrics(tmp_path / "whole")["tables"] == metrics(tmp_path / "cut")["tables"]
    with h5py.File(tmp_path / "whole" / "maps.h5") as one, h5py.File(tmp_path / "cut" / "maps.h5") as other:
        for name in ("teacher/0", "distilled/0", "baseline/3"):
            assert np.array_equal(one[f"{name}/sigma"][()], other[f"{name}/sigma"][()])
    calls.clear()
    quantify(
        [*flags, "--out", str(tmp_path / "cut"), "--threshold", "0.05", "--background", "image", "--empty", "zero"]
    )
    quantify([*flags, "--out", str(tmp_path / "cut"), "--distance", "epoch", "--masks", "central", "--pictures", "1"])
    assert not calls, "how maps are summed up does not search them again"
    assert metrics(tmp_path / "whole")["tables"] != metrics(tmp_path / "cut")["tables"]


def test_a_network_trained_again_is_searched_again(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "distilled", tmp_path / "run")
    flags = ["--distilled", str(tmp_path / "run"), "--layer", "conv", *QUICK, "--out", str(tmp_path / "q")]
    quantify([*flags, "--epochs", "0,3"])
    file = tmp_path / "run" / "weights" / "epoch0003.pth"
    content = read_checkpoint(file)
    content["model"]["base.conv1.weight"] *= 1.1
    write_checkpoint(file, {key: value for key, value in content.items() if key != "format"})
    search, seen = maps.information_discarding, []
    monkeypatch.setattr(maps, "information_discarding", lambda *a, **k: (seen.append(1), search(*a, **k))[1])
    quantify([*flags, "--epochs", "0,3"])
    assert len(seen) == 1


def test_embeddings_are_explained_without_a_relu(image_folder, tmp_path, teacher_run):
    train([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "student"), "--record_weights", "0,1"])
    flags = ["--teacher", str(teacher_run), "--distilled", str(tmp_path / "student"), *QUICK]
    config = parse("quantify", flags).config
    networks = subjects.networks_of(config, [])
    assert [(n.name, n.layer, n.relu, list(n.checkpoints)) for n in networks] == [
        ("teacher", "embedding", False, [0]),
        ("distilled", "embedding", False, [0, 1, 2]),
    ]
    moved = read_distances(tmp_path / "student" / "weights")["linear.weight"]
    np.testing.assert_allclose(networks[1].distance, np.cumsum(moved.path) / moved.start)
    assert quantify([*flags, "--out", str(tmp_path / "q")]) == 0
    assert metrics(tmp_path / "q")["tables"][0]["title"] == "images effective for the distilled"


def test_masks_belong_to_images_by_their_path(runs, tmp_path, image_folder):
    images = tmp_path / "photos.jpg.d"  # a suffix inside the path must not be taken for the image's
    write_images(images, 2, 3, size=48)
    for file in images.rglob("*.png"):
        place = tmp_path / "masks" / file.relative_to(images).with_suffix(".npy")
        place.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((48, 48), np.uint8)
        mask[:, :24] = 255
        np.save(place, mask)
    flags = [
        "--distilled",
        str(runs / "distilled"),
        "--layer",
        "conv",
        *QUICK,
        "--images",
        str(images),
        "--epochs",
        "3",
    ]
    flags += ["--view", "whole"]
    config = parse("quantify", [*flags, "--masks", str(tmp_path / "masks")]).config
    networks = subjects.networks_of(config, [])
    found = subjects.images_of(config, networks, [])
    assert found.foreground[:, :, :2].all() and not found.foreground[:, :, 2:].any()
    assert all(name.startswith("class") for name in found.names)
    assert quantify([*flags, "--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "q")]) == 0
    rows = "\n".join(f"{file.relative_to(images).as_posix()},0,24,48,24" for file in images.rglob("*.png"))
    (tmp_path / "boxes.csv").write_text(f"path,x,y,width,height\n{rows}\n")
    config = parse("quantify", [*flags, "--masks", str(tmp_path / "boxes.csv")]).config
    below = subjects.images_of(config, networks, []).foreground
    assert below[:, 2:].all() and not below[:, :2].any()
    empty = next((tmp_path / "masks").rglob("*.npy"))
    kept = np.load(empty)
    np.save(empty, kept * 0)
    notes = []
    config = parse("quantify", [*flags, "--count", "6", "--masks", str(tmp_path / "masks")]).config
    subjects.images_of(config, networks, notes)
    assert "1 of 6 images have no foreground" in notes[0]
    (tmp_path / "boxes.csv").write_text((tmp_path / "boxes.csv").read_text().replace("0,24,48,24", "0,0,48,48"))
    config = parse("quantify", [*flags, "--masks", str(tmp_path / "boxes.csv")]).config
    with pytest.raises(UserError, match="no image has both foreground and background"):
        subjects.images_of(config, networks, [])
    empty.unlink()
    with pytest.raises(UserError, match="has nothing for 1 of the 6 chosen images, the first class"):
        quantify([*flags, "--count", "6", "--masks", str(tmp_path / "masks"), "--out", str(tmp_path / "q2")])
    assert not (tmp_path / "q2").exists()


def test_a_run_without_a_record_is_looked_at_as_it_is(runs, tmp_path, capsys):
    shutil.copytree(runs / "baseline", tmp_path / "plain", ignore=shutil.ignore_patterns("weights"))
    flags = ["--distilled", str(runs / "distilled"), "--baseline", str(tmp_path / "plain"), "--layer", "conv", *QUICK]
    quantify([*flags, "--out", str(tmp_path / "q")])
    assert "no weights were recorded" in capsys.readouterr().out.replace("\n  ", " ")
    assert metrics(tmp_path / "q")["tables"][1]["metrics"]["rho"]["baseline"] is None


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "there is no network to look at"),
        (["--distilled", "D", "--layer", "conf"], "did you mean 'conv'"),
        (["--distilled", "D", "--layer", "conv", "--grid", "40"], "does not fit images of 32 px"),
        (["--distilled", "D", "--layer", "conv", "--grid", "0"], "grid is 0; give 1 or more"),
        (
            ["--distilled", "D", "--layer", "conv", "--epochs", "0,9"],
            "has no checkpoint of epoch 9; it has --epochs 0,1,2,3",
        ),
        (["--distilled", "D", "--layer", "conv", "--epochs", "few"], "write numbers as in 0,5,10"),
        (["--distilled", "D", "--layer", "conv", "--count", "0"], "--count is 0; give 1 or more"),
        (["--distilled", "D", "--layer", "conv", "--images", "nowhere"], "is no folder"),
        (["--distilled", "D", "--layer", "conv", "--masks", "nowhere"], "give the folder of the images too"),
        (["--distilled", "D", "--layer", "base"], "no tensor; tap a layer inside it"),
        (["--distilled", "D", "--layer", "conv", "--teacher_layer", "fc1"], "give --teacher, or leave it out"),
        (["--distilled", "D", "--layer", "conv", "--draws", "3", "--antithetic"], "give an even number"),
        (["--distilled", "D", "--layer", "conv", "--target", "high"], "--target"),
        (["--distilled", "nowhere", "--layer", "conv"], "does not exist"),
        (["--distilled", "D", "--layers", "conv"], "--layer"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(flags, words, runs, tmp_path):
    flags = [str(runs / "distilled") if flag == "D" else flag for flag in flags]
    with pytest.raises(UserError, match=words):
        quantify([*flags, "--out", str(tmp_path / "q")])
    assert not (tmp_path / "q").exists()


def test_maps_of_another_search_are_not_taken(runs, tmp_path):
    flags = [
        "--distilled",
        str(runs / "distilled"),
        "--layer",
        "conv",
        "--epochs",
        "3",
        *QUICK,
        "--out",
        str(tmp_path / "q"),
    ]
    quantify(flags)
    write_images(tmp_path / "others", 5, 1)
    for other, words in ((["--draws", "6"], "draws 4, these have 6"), (["--seed", "1"], "seed 0, these have 1")):
        with pytest.raises(UserError, match=words):
            quantify([*flags, *other])
    with pytest.raises(UserError, match="holds maps of other images"):
        quantify([*flags, "--images", str(tmp_path / "others")])
    quantify([*flags, "--draws", "6", "--resume", "never"])
    (tmp_path / "q" / "maps.h5").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no file of maps"):
        quantify(flags)


def test_a_state_dict_and_a_feature_that_never_answers_are_refused(runs, tmp_path):
    content = read_checkpoint(runs / "distilled")
    torch.save(content["model"], tmp_path / "plain.pth")
    with pytest.raises(UserError, match="plain state dict"):
        quantify(["--distilled", str(tmp_path / "plain.pth"), *QUICK, "--images", str(tmp_path)])
    content["model"] = {
        key: value * 0 if value.is_floating_point() else value for key, value in content["model"].items()
    }
    write_checkpoint(tmp_path / "dead.pth", {key: value for key, value in content.items() if key != "format"})
    write_images(tmp_path / "images", 1, 2)
    flags = ["--distilled", str(tmp_path / "dead.pth"), "--layer", "conv", "--images", str(tmp_path / "images"), *QUICK]
    with pytest.raises(UserError, match="of the distilled network answers to noise in none of the images"):
        quantify([*flags, "--out", str(tmp_path / "q")])


def test_dry_run_says_what_would_be_done_and_writes_nothing(runs, tmp_path, capsys):
    assert quantify([*three(runs), "--layer", "conv", *QUICK, "--dry_run", "--out", str(tmp_path / "q")]) == 0
    printed = capsys.readouterr().out
    assert "45 maps to search" in printed and "epochs 0, 1, 2, 3" in printed and not (tmp_path / "q").exists()


def test_unreadable_images_are_named_or_skipped(runs, tmp_path, capsys):
    images = write_images(tmp_path / "images", 1, 3)
    (images / "class00" / "01.png").write_bytes(b"no image")
    flags = [
        "--distilled",
        str(runs / "distilled"),
        "--layer",
        "conv",
        "--epochs",
        "3",
        "--images",
        str(images),
        *QUICK,
    ]
    with pytest.raises(UserError, match="01.png"):
        quantify([*flags, "--out", str(tmp_path / "q")])
    assert quantify([*flags, "--skip_unreadable", "--out", str(tmp_path / "q")]) == 0
    assert metrics(tmp_path / "q")["tables"][1]["images"] == 2
    assert "skipped 1 unreadable images" in capsys.readouterr().out


def test_a_network_can_be_added_and_flags_that_only_sum_up_keep_the_folder(runs, tmp_path, monkeypatch):
    flags = ["--layer", "conv", *QUICK, "--epochs", "0,3", "--out", str(tmp_path / "q")]
    quantify(["--distilled", str(runs / "distilled"), *flags])
    search, seen = maps.information_discarding, []
    monkeypatch.setattr(maps, "information_discarding", lambda *a, **k: (seen.append(1), search(*a, **k))[1])
    quantify(["--distilled", str(runs / "distilled"), "--baseline", str(runs / "baseline"), *flags])
    assert len(seen) == 2, "two checkpoints of the baseline"
    with pytest.raises(UserError, match="give another --out"):
        quantify(["--distilled", str(runs / "distilled"), *flags, "--layer", "pooled"])
    plain = ["--distilled", "run", "--layer", "conv"]
    same = [parse("quantify", [*plain, *more]).config for more in ([], ["--masks", "a.csv"], ["--epochs", "0,5"])]
    assert len({_default_out(config) for config in same}) == 1
    other = parse("quantify", [*plain, "--draws", "8"]).config
    assert _default_out(other) != _default_out(same[0])


def test_networks_that_see_images_of_different_sizes(runs, image_folder, tmp_path):
    flags = [*CLASSIFY, "--data", str(image_folder), "--base", "resnet8_x0.25:stem_stride=2", "--input_size", "24"]
    train([*flags, "--epochs", "1", "--device", "cpu", "--save_dir", str(tmp_path / "small")])
    flags = ["--teacher", str(runs / "teacher"), "--distilled", str(tmp_path / "small"), "--layer", "conv", *QUICK]
    assert quantify([*flags, "--out", str(tmp_path / "q")]) == 0
    with pytest.raises(UserError, match="leave --view crop out"):
        quantify([*flags, "--view", "crop", "--out", str(tmp_path / "q2")])


def test_one_checkpoint_and_no_epochs(runs, tmp_path, capsys):
    file = runs / "distilled" / "best.pth"
    flags = ["--distilled", str(file), "--layer", "conv", *QUICK, "--images", str(tmp_path / "images")]
    write_images(tmp_path / "images", 1, 2)
    with pytest.raises(UserError, match="leave --epochs out"):
        quantify([*flags, "--epochs", "0,3", "--out", str(tmp_path / "q")])
    assert quantify([*flags, "--out", str(tmp_path / "q")]) == 0
    assert "is one checkpoint (give its run to see how it learned)" in capsys.readouterr().out.replace("\n  ", " ")


def test_a_preset_is_no_flag_of_it():
    with pytest.raises(UserError, match="--preset"):
        parse("quantify", ["--preset", "zoo"])
