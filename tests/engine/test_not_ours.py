"""What somebody else put where we write: it is refused in one sentence or left alone, and never changed."""

import json
import os
import shutil
import time

import h5py
import numpy as np
import pytest
import torch
import yaml
from killing import same
from mortal import attempt
from tiny import TINY

from metric_kd.cli.main import main as metric_kd
from metric_kd.data import download
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.written import MANIFEST, Written
from metric_kd.errors import UserError
from metric_kd.locks import alone


def tree(folder) -> dict:
    """Everything below a folder: name -> bytes, or what else it is."""

    def content(path):
        if path.is_symlink():
            return "->", os.readlink(path)
        return path.read_bytes() if path.is_file() else path.stat().st_mode

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """A finished run, with a record of its weights."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert metric_kd(flags_of(image_folder, run)) == 0
    return run


def flags_of(data, run, *more):
    short = ("--epochs", "1", "--iter_per_epoch", "2", "--record_weights", "all")
    return ["train", *TINY, "--data", str(data), "--save_dir", str(run), *short, *map(str, more)]


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, with its manifest."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def train(image_folder, tmp_path, capsys):
    """Train into tmp_path/run: the exit status and the last line of stderr."""

    def call(*more):
        capsys.readouterr()
        status = metric_kd(flags_of(image_folder, tmp_path / "run", *more))
        return status, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return call


@pytest.fixture
def older(run):
    """The run as versions before manifests left it."""
    (run / MANIFEST).unlink()
    return run


def of_nobody(kind, folder):
    """Make a folder that is no run."""
    folder.mkdir()
    if kind == "a repository":
        (folder / ".git").mkdir()
        (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    elif kind == "photos":
        (folder / "holiday").mkdir()
        (folder / "holiday" / "1.jpg").write_bytes(b"\xff\xd8\xff")
    elif kind == "an empty folder in it":
        (folder / "tensorboard").mkdir()
    elif kind == "a link":
        (folder / "weights").symlink_to(folder.parent)
    elif kind == "a pipe":
        os.mkfifo(folder / "config.yaml")
    elif kind == "a lock with content":
        (folder / ".lock").write_text("1234")
    elif kind == "a config without a checkpoint":
        (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": "x", "epochs": 3, "batch": 2}))
        (folder / "best.pth").write_bytes(b"theirs")
    elif kind == "a checkpoint without a config":
        write_checkpoint(folder / "best.pth", {"model": {}})
        (folder / "config.yaml").write_text("mine: 1\n")
    elif kind == "a list of another program":
        (folder / MANIFEST).write_text('{"written": ["config.yaml"]}')
        (folder / "config.yaml").write_text("a: 1")
    elif kind == "a list that points outside":
        (folder / MANIFEST).write_text('{"format": "metric_kd folder 1", "written": ["config.yaml", "../kept"]}')
    else:
        (folder / kind).write_text("mine")


OTHERS = [
    "config.yaml", "result.txt", "card.json", "metrics.jsonl", "best.pth", "last.pth", "evidence.json",
    "analysis.json", "peer_review.pth", ".x.part", ".best.pth.abcd1234.part", "log.txt", ".env", "a repository",
    "photos", "an empty folder in it", "a link", "a pipe", "a lock with content", "a config without a checkpoint",
    "a checkpoint without a config", "a list of another program", "a list that points outside",
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("more", [(), ("--resume", "never")], ids=["auto", "never"])
def test_a_folder_that_is_no_run_is_refused_and_stays_as_it_is(train, tmp_path, kind, more, monkeypatch):
    of_nobody(kind, tmp_path / "run")
    (tmp_path / "kept").write_text("kept")
    before = tree(tmp_path)
    monkeypatch.setattr("metric_kd.cli.session.load_splits", None)  # before any data is read
    status, said = train(*more)
    assert status == 2 and said.startswith("error: ") and said.endswith(".") and str(tmp_path / "run") in said
    assert "another" in said and tree(tmp_path) == before
    with pytest.raises(UserError, match="another"):
        RunDirectory(tmp_path / "run").check_own()


@pytest.mark.parametrize(
    "name", [None, ".DS_Store", ".gitkeep", "lost+found", ".lock", "..metric_kd.json.k1ll3d00.metric_kd.part"]
)
def test_a_folder_that_counts_as_empty_is_trained_into_and_a_refused_start_leaves_it(train, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    if name == "lost+found":
        (folder / name).mkdir()
    elif name is not None:
        (folder / name).write_bytes(b"" if name == ".lock" else b"half")
    ours = name is not None and (name == ".lock" or "metric_kd" in name)
    before = {} if ours else tree(folder)
    status, said = train("--lr", "1e38")
    assert status == 2 and "not finite" in said and tree(folder) == before
    assert train()[0] == 0 and (folder / "result.txt").exists()
    assert {key: tree(folder)[key] for key in before} == before


def test_a_refused_start_leaves_no_folder_where_there_was_none(image_folder, tmp_path, capsys):
    run = tmp_path / "a" / "b" / "run"
    assert metric_kd(flags_of(image_folder, run, "--lr", "1e38")) == 2
    assert list(tmp_path.iterdir()) == []


FOREIGN = {
    "evidence.json": b'{"mine": 1}',
    "analysis.json": b"[]",
    "compatibility.json": b"",
    "cka.png": b"picture",
    "peer_review.pth": b"reviews",
    "peer1.pth": b"a friend",
    ".x.part": b"theirs",
    ".best.pth.abcd1234.part": b"theirs",
    "notes.txt": b"notes",
    "weights/epoch0077.pth": b"theirs",
    "weights/notes.txt": b"notes",
    "tensorboard/events.out.tfevents.1.host.2.3": b"events",
}


@pytest.mark.parametrize("old", [False, True], ids=["with a list", "of an older version"])
def test_starting_over_removes_what_the_run_wrote_and_nothing_else(train, run, old, finished):
    if old:
        (run / MANIFEST).unlink()
    (run / "tensorboard").mkdir(exist_ok=True)
    for name, content in FOREIGN.items():
        (run / name).write_bytes(content)
    before = tree(run)
    status, said = train("--lr", "1e38", "--resume", "never")  # refused, after the old run is gone
    assert status == 2 and "not finite" in said
    kept = {key: value for key, value in tree(run).items() if isinstance(value, bytes) and key != MANIFEST}
    events = {key for key in before if "tfevents" in key and "metric_kd" in key} if old else set()
    assert kept == FOREIGN | {key: before[key] for key in events}
    assert train() == (0, said) or train()[0] == 0, "the same folder, known as a run's still"
    assert {name: tree(run)[name] for name in FOREIGN} == FOREIGN and same(run, finished)


@pytest.mark.parametrize(
    "name", ["weights", "tensorboard", "best.pth", "last.pth", "config.yaml", "metrics.jsonl", "result.txt"]
)
@pytest.mark.parametrize("more", [("--resume", "never"), ("--epochs", "2")], ids=["never", "longer"])
def test_links_in_a_run_are_refused(train, run, tmp_path, name, more):
    target = tmp_path / "elsewhere"
    if (run / name).exists():
        shutil.move(run / name, target)
    else:
        target.mkdir()
    (run / name).symlink_to(target)
    before = tree(tmp_path)
    status, said = train(*more)
    assert status == 2 and f"{run / name} is a link" in said and tree(tmp_path) == before


def test_a_link_to_the_folder_itself_is_the_users_choice(train, run, tmp_path):
    run.rename(tmp_path / "disk")
    run.symlink_to(tmp_path / "disk")
    assert train("--epochs", "2")[0] == 0 and run.is_symlink()
    assert train("--resume", "never")[0] == 0 and run.is_symlink() and (tmp_path / "disk" / "result.txt").exists()


def test_a_foreign_file_where_the_run_will_write_is_refused_before_any_work(train, run):
    (run / "result.txt").unlink()
    written = Written(run)
    written.remove_some(["card.json"])
    (run / "card.json").write_text("mine")
    before = tree(run)
    status, said = train()
    assert status == 2 and "card.json is there and was not written by a run" in said and tree(run) == before


def test_a_foreign_file_where_a_record_will_be_written_is_refused_before_any_step(train, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    Written(folder).add(["config.yaml"])
    (folder / "weights").mkdir()
    (folder / "weights" / "epoch0001.pth").write_text("mine")
    status, said = train()
    assert status == 2 and "epoch0001.pth is there and was not written by a run" in said
    assert (folder / "weights" / "epoch0001.pth").read_text() == "mine" and not (folder / "last.pth").exists()


@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_while_an_older_run_is_removed_the_same_command_starts_over(older, train, moment, finished):
    (older / "mine.txt").write_text("mine")
    assert attempt(lambda: RunDirectory(older).clear(), kill_at=moment)
    assert (moment > 2) == RunDirectory(older).written.manifest.exists()
    if moment == 8:  # the others differ in how many files are left
        assert train("--resume", "never")[0] == 0 and same(older, finished)
    RunDirectory(older).check_own()
    assert (older / "mine.txt").read_text() == "mine"


def test_an_older_run_goes_on_and_is_known_from_then_on(train, older):
    assert train("--epochs", "2")[0] == 0
    assert {"config.yaml", "last.pth", "weights/epoch0000.pth", "weights/epoch0002.pth"} <= Written(older).names
    assert "peer_review.pth" not in Written(older).names


@pytest.mark.parametrize("left", ["", "config.yaml", "half a list", "scratch"])
def test_killed_at_the_very_start_the_same_command_starts(train, tmp_path, left):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    if left == "half a list":
        (folder / f".{MANIFEST}.abcd1234.metric_kd.part").write_text('{"form')
    elif left:
        Written(folder).add(["config.yaml"])
        name = "config.yaml" if left == "config.yaml" else ".config.yaml.abcd1234.metric_kd.part"
        (folder / name).write_text("seed")
    assert train()[0] == 0
    assert not list(folder.glob("*.part")) and not list(folder.glob(".*.part")) and not (folder / ".lock").exists()


def test_commands_beside_a_run_replace_their_own_files_only(run, finished, capsys):
    own = run / "evidence.json"
    own.write_text('{"mine": 1}')
    assert metric_kd(["evidence", str(run), "--against", str(finished)]) == 2
    assert "evidence.json is there" in capsys.readouterr().err and own.read_text() == '{"mine": 1}'
    own.unlink()
    for _ in range(2):
        assert metric_kd(["evidence", str(run), "--against", str(finished)]) == 0
    RunDirectory(run).clear()
    assert not own.exists()


def test_beside_a_mere_checkpoint_no_list_is_begun(finished, tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    shutil.copy(finished / "best.pth", folder)
    run = RunDirectory(folder)
    run.claim_output("evidence.json").write_text(json.dumps(dict.fromkeys(("student", "teacher", "dataset"))))
    assert sorted(os.listdir(folder)) == ["best.pth", "evidence.json"]
    assert run.claim_output("evidence.json").exists()
    (folder / "compatibility.json").symlink_to(folder / "best.pth")
    with pytest.raises(UserError, match="is a link"):
        run.claim_output("compatibility.json")


@pytest.mark.parametrize("name", ["table.txt", "results.json", "plan.json", "comparison.html"])
def test_a_comparison_refuses_a_folder_with_files_of_its_names(tmp_path, name):
    from metric_kd.cli.outcome import FILES, written_in

    (tmp_path / name).write_text('{"rows": 1}')
    with pytest.raises(UserError, match=f"{name} is there"):
        written_in(tmp_path).check([*FILES, "plan.json"])


def test_side_files_of_embed_export_and_report(finished, image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = str(image_folder / "class00")

    def refused(*words):
        before = tree(tmp_path)
        capsys.readouterr()
        assert metric_kd([*map(str, words)]) == 2 and tree(tmp_path) == before
        return capsys.readouterr().err

    (tmp_path / "photos.csv").write_text("path,label\n1.jpg,cat\n")
    assert "photos.csv is there" in refused("embed", finished, "--images", photos, "--out", "photos.npy")
    for _ in range(2):
        assert metric_kd(["embed", str(finished), "--images", photos, "--out", "v.npy"]) == 0
    (tmp_path / "report.html").write_text("<html>mine</html>")
    assert "report.html is there" in refused("report", finished)
    (tmp_path / "n.pt2.json").write_text("{}")
    assert "n.pt2.json is there" in refused("export", finished, "--to", "pt2", "--out", "n.pt2", "--images", photos)


# Unfinished work beside a file: NAME.part.


def put(kind, path):
    if kind == "text":
        path.write_text("a list of spare parts")
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.with_name("diary").write_text("dear diary")
        path.symlink_to(path.with_name("diary"))
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))


KINDS = ["text", "hdf5", "folder", "pipe", "link", "dangling"]


@pytest.fixture(scope="module")
def commands(finished, image_folder):
    """name -> the words of a command that writes a file, which makes NAME.part first."""
    data = ["--dataset", "folder", "--data", str(image_folder)]
    cache = ["distill", *TINY, *data, "--epochs", "1", "--iter_per_epoch", "1", "--teacher_load", str(finished)]
    return {
        "pack": lambda file: ["pack", *data, "--side", "32", "--out", str(file)],
        "jpeg": lambda file: ["pack", *data, "--side", "32", "--jpeg", "90", "--out", str(file)],
        "index": lambda file: ["index", str(finished), "--images", str(image_folder / "class00"), "--out", str(file)],
        "cache": lambda file: [
            *cache, "--dist_ratio", "1", "--views", "1", "--teacher_cache", str(file),
            "--save_dir", str(file.with_name("student")),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("which", "end"),
    [("pack", ".part"), ("jpeg", ".part"), ("jpeg", ".jpeg.part"), ("index", ".part"), ("cache", ".part")],
)
def test_a_foreign_part_is_refused_and_stays(commands, which, end, kind, tmp_path, capsys):
    file = tmp_path / "file"
    put(kind, tmp_path / f"file{end}")
    before = tree(tmp_path)
    capsys.readouterr()
    assert metric_kd(commands[which](file)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"file{end} is " in said and "move it away" in said and tree(tmp_path) == before


@pytest.mark.parametrize("which", ["pack", "jpeg", "index", "cache"])
def test_an_empty_part_and_half_a_scratch_file_are_those_of_a_kill(commands, which, tmp_path):
    file = tmp_path / "file"
    (tmp_path / "file.part").touch()
    (tmp_path / ".file.part.abcd1234.metric_kd.part").write_bytes(b"half")
    for name in (".file.new", ".file.whole", ".file.part.new", ".file.part.abcd1234.part"):
        (tmp_path / name).write_text("theirs")
    assert metric_kd(commands[which](file)) == 0
    left = set(os.listdir(tmp_path)) - {"student"}
    assert left == {"file", ".file.new", ".file.whole", ".file.part.new", ".file.part.abcd1234.part"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_a_download_is_not_written_through_what_is_no_file(kind, tmp_path):
    put(kind, tmp_path / "a.bin.part")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"a\.bin\.part is .*move it away"):
        download.fetch(["http://127.0.0.1:1/a.bin"], tmp_path / "a.bin", "0" * 32, progress=False)
    assert tree(tmp_path) == before


# Locks.


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_a_lock_is_never_taken_through_what_is_no_file(kind, tmp_path):
    put(kind, tmp_path / ".file.lock")
    before = tree(tmp_path)
    for refusal in (None, "busy; wait."):
        with pytest.raises(UserError, match=r"\.file\.lock is .*move it away"), alone(tmp_path / "file", refusal):
            pass
    assert tree(tmp_path) == before


def test_a_lock_that_says_something_is_held_and_stays(tmp_path):
    (tmp_path / ".file.lock").write_text("mine")
    with alone(tmp_path / "file", "busy; wait."):
        assert (tmp_path / ".file.lock").read_text() == "mine"
    assert (tmp_path / ".file.lock").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "others may write", "file", "lock is a link"])
def test_the_lock_of_downloads_lies_in_a_folder_of_this_user_alone(kind, tmp_path, monkeypatch):
    place, victim = tmp_path / "tmp", tmp_path / "victim"
    place.mkdir()
    victim.mkdir()
    (victim / "kept").write_text("kept")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(place))
    own, target = place / f"metric_kd-{os.getuid()}", tmp_path / "a.bin"
    if kind == "link":
        own.symlink_to(victim)
    elif kind == "file":
        own.write_text("mine")
    elif kind == "others may write":
        own.mkdir()
        own.chmod(0o777)
    else:
        with download._exclusive(target):
            (lock,) = own.iterdir()
        assert own.stat().st_mode & 0o777 == 0o700
        lock.unlink()
        lock.symlink_to(victim / "kept")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="of this user alone|is a link"), download._exclusive(target):
        pass
    assert tree(tmp_path) == before


def test_a_folder_that_another_process_writes_is_refused_and_stays_as_it_is(run, train):
    child = os.fork()
    if child == 0:
        with RunDirectory(run).locked():
            (run.parent / "held").touch()
            while not (run.parent / "done").exists():
                time.sleep(0.01)
        os._exit(0)
    while not (run.parent / "held").exists():
        time.sleep(0.01)
    before = tree(run)
    status, said = train("--epochs", "2")
    assert status == 2 and "another process is writing" in said and tree(run) == before
    (run.parent / "done").touch()
    os.waitpid(child, 0)


def test_what_is_read_of_an_older_run_runs_no_code(older, tmp_path, train):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for name in ("best.pth", "last.pth"):
        torch.save({"format": "metric_kd checkpoint 1", "model": Evil()}, older / name)
    assert train()[0] == 2 and not (tmp_path / "owned").exists()
    (older / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'owned'}']")
    assert train()[0] == 2 and not (tmp_path / "owned").exists()
    with pytest.raises(UserError):
        read_checkpoint(older / "best.pth")
