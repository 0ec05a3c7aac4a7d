"""A teacher that is asked once: the same training as with the teacher at hand, and never an answer of anything else."""

import gc
import itertools
import json
import os
import shutil
import weakref
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from killing import Killed, kill_at, same, weights
from mortal import attempt
from tiny import TINY, launched, write_images

from metric_kd.cli.distill import main as distill
from metric_kd.cli.losses import fold
from metric_kd.cli.making import make_task
from metric_kd.cli.parse import parse
from metric_kd.cli.session import build, checked
from metric_kd.cli.teacher_cache import refusals
from metric_kd.cli.train import main as train
from metric_kd.cli.validate import validate
from metric_kd.data.folder import scan
from metric_kd.data.loading import ImageLoader
from metric_kd.data.packing import make_pack
from metric_kd.data.transforms import Geometry
from metric_kd.data.views import Views
from metric_kd.engine import cache_file
from metric_kd.engine.cache_file import read_cache
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.engine.teacher_cache import Teacher, cached
from metric_kd.errors import UserError
from metric_kd.models import network as networks
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return scan(write_images(tmp_path_factory.mktemp("few"), classes=3, per_class=3), "folder")


@pytest.fixture
def asked():
    torch.manual_seed(0)
    spec = NetworkSpec("resnet8_x0.25:stem_stride=2", 6, True, 32, num_classes=3)
    return Teacher(build_network(spec), CPU, "fp32", ("embedding",))


def loader_of(records, views=4, seed=0, **geometry):
    return ImageLoader(records, Geometry(32, **geometry), views=Views(views, seed))


def oracle(teacher, loader, field="embedding"):
    """(N, V, D), image by image."""
    found = []
    teacher.network.eval()
    with torch.no_grad():
        for row, view in itertools.product(range(len(loader)), range(loader.views.count)):
            batch = loader.fixed(np.array([row]), np.array([view]))
            found.append(getattr(teacher.network(batch.images, want=(field,)), field)[0])
    return torch.stack(found).reshape(len(loader), loader.views.count, -1)


def test_the_file_holds_what_the_teacher_says_of_every_view(records, asked, tmp_path):
    loader, file = loader_of(records), tmp_path / "deep" / "c.h5"
    held = ImageLoader(records.select(np.array([1, 7])), Geometry(32, flip=False))
    teacher = asked._replace(fields=("embedding", "logits"))
    stored = cached(file, teacher, loader, {"test": held}, batch=6)
    with h5py.File(file) as content:
        for field in teacher.fields:
            assert content[field].dtype == np.float32 and content[field].chunks is None
            torch.testing.assert_close(torch.from_numpy(content[field][()]), oracle(asked, loader, field))
        assert content["written"][()].tolist() == [9, 2] and content["test/embedding"].shape == (2, 1, 6)
        about = dict(content.attrs)
    assert about["views"] == 4 and about["fields"] == "embedding logits" and about["teacher"] == stored.about["teacher"]
    batch = next(iter(loader.train([np.array([5, 0, 8])], 3)))
    said = stored.outputs_of(batch, ("logits", "embedding"))
    torch.testing.assert_close(said.embedding, oracle(asked, loader)[batch.indices, batch.views])
    assert said.maps is None and said.logits.shape == (3, 3) and not said.embedding.requires_grad
    torch.testing.assert_close(
        stored.held_out["test"], asked.network(held.example(2).images, want=("embedding",)).embedding.detach()
    )
    assert os.listdir(file.parent) == ["c.h5"]


def test_an_array_answers_by_image_whatever_view(records):
    table = np.arange(12.0).reshape(6, 1, 2)
    stored = StoredTeacher({"embedding": table}, {}, rows=np.array([5, 0, 3]))
    rows = torch.tensor([2, 0, 2])
    for views in (None, torch.tensor([4, 1, 0])):
        said = stored.outputs_of(Batch(torch.zeros(3, 3, 8, 8), rows, rows, views), ("embedding",)).embedding
        assert said.tolist() == [[6, 7], [10, 11], [6, 7]] and said.dtype == torch.float32


def half_of_write(write, part, offset, values):
    flat = np.ascontiguousarray(values).reshape(-1)
    write(part, offset, flat[: len(flat) // 2])
    part.handle.flush()


CALLS = {(cache_file.Part, "_write"): half_of_write, (os, "fsync"): None, (os, "replace"): None}


def test_killed_at_any_moment_it_goes_on_and_is_never_taken_for_whole(records, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "SAVE_SECONDS", -1.0)
    loader, file, part = loader_of(records, views=2), tmp_path / "c.h5", tmp_path / "c.h5.part"
    expected = oracle(asked, loader).numpy()
    for moment in itertools.count(1):
        status = attempt(lambda: cached(file, asked, loader, batch=6), kill_at=moment, calls=CALLS)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), "it died of something else"
        for name in (file, part):
            if name.exists():
                try:
                    found = read_cache(name).tables["embedding"]
                except UserError as error:
                    assert "half-written" in str(error)
                else:
                    np.testing.assert_allclose(found, expected, atol=1e-6)
        cached(file, asked, loader, batch=6)
        np.testing.assert_allclose(read_cache(file).tables["embedding"], expected, atol=1e-6)
        assert set(os.listdir(tmp_path)) <= {"c.h5", ".c.h5.lock"}
        file.unlink()
    assert moment > 12, "the writes are not counted any more"


def test_what_is_written_is_not_asked_again_unless_it_is_of_another_teacher(records, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_file, "SAVE_SECONDS", -1.0)
    loader, file = loader_of(records, views=2), tmp_path / "c.h5"
    assert attempt(lambda: cached(file, asked, loader, batch=2), kill_at=24, calls=CALLS) != 0
    with h5py.File(tmp_path / "c.h5.part") as content:
        done = int(content["written"][0])
    assert 2 <= done < 9
    said, say = [], Teacher.say
    monkeypatch.setattr(Teacher, "say", lambda self, batch: said.append(batch.indices.tolist()) or say(self, batch))
    shutil.copy(tmp_path / "c.h5.part", tmp_path / "kept")
    cached(file, asked, loader, batch=2)
    assert said[1 : 1 + 9 - done] == [[row, row] for row in range(done, 9)], "after the example, the missing rows"
    file.unlink()
    shutil.copy(tmp_path / "kept", tmp_path / "c.h5.part")
    other = asked._replace(network=build_network(asked.network.spec))
    cached(file, other, loader, batch=18)
    torch.testing.assert_close(torch.from_numpy(np.array(read_cache(file).tables["embedding"])), oracle(other, loader))


@pytest.fixture
def refused(records, asked, tmp_path):
    """Make a cache, then ask for it in another way: the sentence."""
    file = tmp_path / "c.h5"
    cached(file, asked, loader_of(records))

    def call(loader=None, **other):
        with pytest.raises(UserError) as caught:
            cached(file, asked._replace(**other), loader or loader_of(records))
        text = str(caught.value)
        assert "\n" not in text and text.endswith(".") and "c.h5" in text
        return text

    return call


def test_another_teacher_geometry_or_data_is_refused_by_name(records, asked, refused, tmp_path):
    network = build_network(asked.network.spec)
    assert "made with teacher " in refused(network=network)
    assert "made with precision fp32, this run has bf16" in refused(precision="bf16")
    assert "made with views 4, this run has 5" in refused(loader_of(records, views=5))
    assert "made with view_seed 0, this run has 1" in refused(loader_of(records, seed=1))
    assert "made with geometry " in refused(loader_of(records, teacher_input_size=40))
    assert "made with geometry " in refused(loader_of(records, flip=False))
    assert "made with images 9 (" in refused(loader_of(records.select(np.arange(8))))
    assert "holds the teacher's embedding and a loss reads logits" in refused(fields=("embedding", "logits"))
    held = {"test": ImageLoader(records, Geometry(32))}
    with pytest.raises(UserError, match="made with held_out none"):
        cached(tmp_path / "c.h5", asked, loader_of(records), held)


def test_another_form_and_other_pixels_are_refused_by_name(records, asked, refused, tmp_path):
    network = build_network(replace(asked.network.spec, l2normalize=False))
    network.load_state_dict(asked.network.state_dict())
    assert "made with network " in refused(network=network), "the same weights, another embedding"
    pack = make_pack(tmp_path / "p.h5", [records], 32, quality=60)
    packed = ImageLoader(records, Geometry(32), views=Views(4), pack=pack)
    assert "made with pixels files, this run has JPEG 60" in refused(packed)


def test_a_changed_file_is_noticed(records, refused):
    path = records.paths[4]
    state = os.stat(path)
    try:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
        assert "made with files " in refused()
    finally:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_sample_is_asked_again_at_every_start(records, asked, refused, tmp_path):
    with h5py.File(tmp_path / "c.h5", "r+") as content:
        content["embedding"][...] = np.roll(content["embedding"][()], 1, axis=0)
    assert "holds another embedding of training image 0, view 0, than the teacher gives now" in refused()
    with h5py.File(tmp_path / "c.h5", "r+") as content:
        content["embedding"][...] = np.roll(np.roll(content["embedding"][()], -1, axis=0), 1, axis=1)
    assert "holds another embedding" in refused(), "the views are not in order"


def test_other_and_damaged_files_are_refused(records, asked, refused, tmp_path):
    file = tmp_path / "c.h5"
    whole = file.read_bytes()
    for content in (whole[:100], b"no HDF5 file at all", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert "is no teacher cache, or damaged" in refused()
    with h5py.File(file, "w") as content:
        content["embedding"] = np.zeros((9, 4, 6), np.float32)
    assert "no teacher cache" in refused()
    file.write_bytes(whole)
    with h5py.File(file, "r+") as content:
        content["written"][0] = 8
    assert "half-written" in refused()


def test_a_teacher_that_gives_no_numbers_and_a_full_disk_are_said(records, asked, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(UserError, match="make room, give fewer --views"):
            cached(tmp_path / "c.h5", asked, loader_of(records))
    next(asked.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="the teacher's embedding is not finite"):
        cached(tmp_path / "c.h5", asked, loader_of(records))
    assert os.listdir(tmp_path) == []


# --- runs ---

ROUNDING = 1e-3
"""A teacher that rounds otherwise, as in other batches, moves weights by 1e-5: Adam divides by small gradients."""
LIVE = ["--views", "3", "--epochs", "1"]


def flags_of(image_folder, teacher, *more):
    return [*TINY, "--data", str(image_folder), "--teacher_load", str(teacher), *LIVE, *more]


def farthest(one, other):
    first, second = weights(one), weights(other)
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.mark.parametrize(
    "more",
    [
        ["--loss", "rkd:1", "--loss", "l2_triplet:1"],
        ["--loss", "rkd_angle:2", "--loss", "pkt:100", "--teacher_input_size", "48", "--optimizer", "sgd"],
        ["--loss", "cc:1", "--input_size", "40", "--workers", "2"],
    ],
)
def test_a_run_with_the_cache_is_the_run_with_the_teacher(more, image_folder, teacher_run, tmp_path):
    flags = flags_of(image_folder, teacher_run, *more)
    distill([*flags, "--save_dir", str(tmp_path / "live")])
    distill([*flags, "--save_dir", str(tmp_path / "cached"), "--teacher_cache", str(tmp_path / "c.h5")])
    assert farthest(tmp_path / "live", tmp_path / "cached") < ROUNDING
    distill([*flags, "--save_dir", str(tmp_path / "other"), "--view_seed", "1"])
    assert farthest(tmp_path / "live", tmp_path / "other") > 10 * ROUNDING, "this comparison can tell views apart"
    card = json.loads((tmp_path / "cached" / "card.json").read_text())["environment"]
    assert card["teacher"] == json.loads((tmp_path / "live" / "card.json").read_text())["environment"]["teacher"]
    assert card["teacher_cache"] == read_cache(tmp_path / "c.h5").key


def test_a_classifier_learns_from_stored_logits(image_folder, tmp_path):
    small = [
        "--task",
        "classification",
        "--dataset",
        "folder",
        "--base",
        "resnet8_x0.25:stem_stride=2",
        "--batch",
        "16",
    ]
    small += ["--epochs", "1", "--lr", "0.02", "--device", "cpu", "--data", str(image_folder)]
    train([*small, "--save_dir", str(tmp_path / "teacher")])
    flags = [*small, "--teacher_load", str(tmp_path / "teacher"), "--loss", "st:1,temperature=4", "--views", "2"]
    distill([*flags, "--save_dir", str(tmp_path / "live")])
    distill([*flags, "--save_dir", str(tmp_path / "cached"), "--teacher_cache", str(tmp_path / "c.h5")])
    assert farthest(tmp_path / "live", tmp_path / "cached") < ROUNDING
    assert set(read_cache(tmp_path / "c.h5").tables) == {"embedding", "logits"}


@pytest.mark.parametrize("step", [1, 3, 6])
def test_killed_and_resumed_gives_the_same_weights(step, image_folder, teacher_run, tmp_path, monkeypatch):
    flags = flags_of(image_folder, teacher_run, "--loss", "rkd:1", "--epochs", "2", "--save_minutes", "0")
    flags += ["--teacher_cache", str(tmp_path / "c.h5")]
    distill([*flags, "--save_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            distill([*flags, "--save_dir", str(tmp_path / "cut")])
    distill([*flags, "--save_dir", str(tmp_path / "cut")])
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_the_network_is_let_go_and_nothing_of_the_teacher_is_saved(image_folder, teacher_run, tmp_path, monkeypatch):
    made = []
    restore = networks.build_network
    monkeypatch.setattr(
        "metric_kd.engine.checkpoint.build_network", lambda spec: made.append(weakref.ref(n := restore(spec))) or n
    )
    flags = flags_of(image_folder, teacher_run, "--loss", "rkd:1", "--teacher_cache", str(tmp_path / "c.h5"))
    session = build(checked(parse("distill", flags)))
    task = make_task(session)
    gc.collect()
    assert isinstance(task.teacher, StoredTeacher) and [r() for r in made] == [None]
    assert {name.split(".")[0] for name in task.state_dict()} == {"student"}
    distill([*flags, "--save_dir", str(tmp_path / "run")])
    assert {key.split(".")[0] for key in read_checkpoint(tmp_path / "run" / "last.pth")["task"]} == {"student"}


def test_a_dry_run_makes_no_cache(image_folder, teacher_run, tmp_path, capsys):
    flags = flags_of(image_folder, teacher_run, "--loss", "rkd:1", "--teacher_cache", str(tmp_path / "c.h5"))
    assert distill([*flags, "--save_dir", str(tmp_path / "run"), "--dry_run"]) == 0
    assert "would be made first" in capsys.readouterr().out and os.listdir(tmp_path) == []


REFUSALS = [
    (
        ["--loss", "at:1"],
        "loss 'at' reads the teacher's maps, and --teacher_cache holds its embedding and logits alone",
    ),
    (["--loss", "fitnet:1"], "loss 'fitnet' reads the teacher's maps"),
    (["--loss", "ofd:1"], "loss 'ofd' reads the teacher's preacts"),
    (["--loss", "crd:1"], "loss 'crd' runs the teacher's network itself"),
    (["--loss", "bss:1"], "loss 'bss' runs the teacher's network itself"),
    (["--loss", "sobolev:1"], "loss 'sobolev' takes gradients of the teacher"),
    (["--loss", "imitate:1,layer=pooled"], "reads the teacher's pooled"),
    (["--imitate", "conv"], "which --imitate needs"),
    (["--loss", "rkd:1", "--fit_head", "conv", "--load", "x"], "which --fit_head needs"),
    (["--loss", "rkd:1", "--granularity", "mag", "--granularity_load", "x"], "which --granularity needs"),
    (["--loss", "rkd:1", "--views", "0"], "give --views V too"),
    (["--loss", "rkd:1", "--views", "-1"], "--views is -1"),
    (["--loss", "rkd:1", "--view_seed", "-1"], "--view_seed is -1"),
    (["--loss", "rkd:1", "--teacher_load", "x.npy"], "is stored already; leave --teacher_cache out"),
]


@pytest.mark.parametrize("more, sentence", REFUSALS)
def test_what_a_cache_cannot_give_is_refused_before_any_work(more, sentence, teacher_run, tmp_path):
    flags = flags_of(tmp_path / "no data", teacher_run, "--teacher_cache", str(tmp_path / "c.h5"), *more)
    sentences = validate(fold(parse("distill", flags).config))
    assert any(sentence in text for text in sentences), sentences
    assert all(text.endswith(".") and "\n" not in text for text in sentences)


def test_every_loss_of_embeddings_alone_is_served():
    for loss in (
        "sp:1,features=embedding",
        "rkd:1",
        "dark_rank:1",
        "cc:1",
        "pkt:1",
        "st:1",
        "logits:1",
        "l2_triplet:1",
    ):
        config = parse(
            "distill", ["--teacher_load", "x", "--teacher_cache", "y", "--views", "1", "--loss", loss]
        ).config
        assert refusals(fold(config)) == []


def test_peers_and_folders_are_refused(tmp_path):
    flags = [*TINY, "--mutual", "resnet8", "--views", "2", "--teacher_cache", str(tmp_path)]
    sentences = refusals(fold(parse("distill", flags).config))
    assert any("which --mutual needs" in text for text in sentences)
    assert any("is a folder; give a file" in text for text in sentences)


def test_two_processes_make_one_cache_and_train_by_it(image_folder, teacher_run, tmp_path):
    flags = flags_of(image_folder, teacher_run, "--loss", "rkd:1", "--freeze_bn", "true", "--optimizer", "sgd")
    two = [*flags, "--save_dir", str(tmp_path / "two"), "--teacher_cache", str(tmp_path / "two.h5")]
    for done in launched("run_distill.py", *two):
        assert done.returncode == 0, done.stderr[-3000:]
    distill([*flags, "--save_dir", str(tmp_path / "one"), "--teacher_cache", str(tmp_path / "one.h5")])
    tables = [read_cache(tmp_path / name).tables["embedding"] for name in ("one.h5", "two.h5")]
    np.testing.assert_allclose(*tables, atol=1e-6)
    assert farthest(tmp_path / "one", tmp_path / "two") < 1e-5
