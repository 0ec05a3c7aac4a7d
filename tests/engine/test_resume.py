"""A run killed at any moment and started again ends with the same weights, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from template import Forked
from tiny import ROOT, THREADS, TINY, command, launched, start

from metric_kd.cli.train import main
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.weight_record import checkpoints_of, read_distances
from metric_kd.errors import UserError


def weights(run: Path) -> dict:
    return read_checkpoint(run / "best.pth")["model"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def flags(data: Path, run: Path, *more: str) -> list[str]:
    return [*TINY, "--data", str(data), "--save_dir", str(run), "--loss", "l2_triplet:1,sample=distance", *more]


def wait_for(condition, process: Forked, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def step_of(run: Path) -> int:
    """The step that the last whole checkpoint stands at, or 0."""
    return read_checkpoint(run / "last.pth")["position"]["step"] if (run / "last.pth").exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(image_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(int(THREADS))
    main(flags(image_folder, run, "--epochs", "6", "--iter_per_epoch", "12", "--save_minutes", "0"))
    return run


@pytest.mark.parametrize("kill_at", [1, 25, 61])
def test_sigkill_then_resume_gives_the_same_weights(image_folder, tmp_path, uninterrupted, kill_at):
    run = tmp_path / "run"
    arguments = flags(image_folder, run, "--epochs", "6", "--iter_per_epoch", "12", "--save_minutes", "0")
    process = start(arguments)
    wait_for(lambda: step_of(run) >= kill_at, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "result.txt").exists(), "the kill came too late to test anything"
    assert kill_at <= step_of(run) < 72
    (run / ".last.pth.abcd1234.metric_kd.part").write_bytes(b"half")
    main(arguments)
    assert not list(run.glob(".*.part")), "half-written files are swept out"
    assert equal(weights(run), weights(uninterrupted))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *whole):
        line.pop("seconds")
    assert lines == whole
    assert (run / "result.txt").read_text() == (uninterrupted / "result.txt").read_text()


def test_sigterm_saves_and_says_how_to_go_on(image_folder, tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = flags(image_folder, run, "--epochs", "6", "--iter_per_epoch", "12", "--save_minutes", "60")
    process = start(arguments)
    wait_for(lambda: step_of(run) >= 12, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 143, output
    assert "the same command goes on" in output
    main(arguments)
    assert equal(weights(run), weights(uninterrupted))


def test_a_larger_epochs_goes_on_and_equals_the_longer_run(image_folder, tmp_path, uninterrupted, capsys):
    run = tmp_path / "run"
    more = ["--iter_per_epoch", "12", "--save_minutes", "0"]
    main(flags(image_folder, run, "--epochs", "4", *more))
    assert not equal(weights(run), weights(uninterrupted))
    main(flags(image_folder, run, "--epochs", "6", *more))
    assert equal(weights(run), weights(uninterrupted))
    capsys.readouterr()
    main(flags(image_folder, run, "--epochs", "6", *more))
    output = capsys.readouterr().out
    assert "is finished" in output and "Final Recall@1" in output
    with pytest.raises(UserError, match="more than --epochs 4"):
        main(flags(image_folder, run, "--epochs", "4", *more))


def test_another_config_names_the_first_differing_key(image_folder, tmp_path):
    run = tmp_path / "run"
    main(flags(image_folder, run))
    with pytest.raises(UserError, match=r"with seed 0, this one has 7"):
        main(flags(image_folder, run, "--seed", "7"))
    with pytest.raises(UserError, match=r"with loss \['l2_triplet:1,margin=0\.2"):
        main(flags(image_folder, run, "--margin", "0.7"))
    main(flags(image_folder, run, "--margin", "0.7", "--resume", "never"))


def test_the_saved_config_repeats_the_run(image_folder, tmp_path):
    main(flags(image_folder, tmp_path / "one"))
    main(["--config", str(tmp_path / "one" / "config.yaml"), "--save_dir", str(tmp_path / "two")])
    assert equal(weights(tmp_path / "one"), weights(tmp_path / "two"))


def test_two_processes_never_share_a_directory(image_folder, tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys\n"
        "from metric_kd.engine.run_directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).locked():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process"):
        main(flags(image_folder, run))
    holder.kill()
    holder.wait()
    main(flags(image_folder, run))


def test_nan_stops_names_the_term_and_keeps_the_last_good_checkpoint(image_folder, tmp_path):
    run = tmp_path / "run"
    plugin = tmp_path / "poison.py"
    plugin.write_text(
        "import torch\n"
        "from metric_kd.losses.term import TERMS, Term\n"
        "@TERMS.register('poison')\n"
        "class Poison(Term):\n"
        "    calls = 0\n"
        "    def forward(self, student, teacher, batch):\n"
        "        Poison.calls += 1\n"
        "        return student.embedding.sum() * (float('nan') if Poison.calls == 7 else 0.0)\n"
    )
    done = command("run.py", *flags(image_folder, run, "--plugins", str(plugin), "--loss", "poison:1"))
    assert done.returncode == 2
    assert "loss 'poison' was not finite at step 7" in done.stderr
    assert step_of(run) == 4 and all(t.isfinite().all() for t in read_checkpoint(run)["model"].values())


@pytest.mark.slow
def test_torchrun_with_two_processes_ends_with_a_checkpoint(image_folder, teacher_run, tmp_path):
    run = tmp_path / "run"
    arguments = [
        *TINY, "--data", str(image_folder), "--teacher_load", str(teacher_run), "--save_dir", str(run),
        "--dist_ratio", "1", "--angle_ratio", "2", "--fitnet_ratio", "0.1", "--record_weights", "all",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run_distill.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*launch, *arguments], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_checkpoint(run / "last.pth")["environment"]["processes"] == 2
    assert "Final Recall@1" in (run / "result.txt").read_text()
    longer = [*arguments, "--epochs", "3"]
    for done in launched("run_distill.py", *longer):
        assert done.returncode == 0, done.stderr[-2000:]
    assert list(checkpoints_of(run / "weights")) == [0, 1, 2, 3], "one process keeps the record, resumed or not"
    assert len(read_distances(run / "weights")["linear.weight"].path) == 4


def test_sigterm_during_evaluation_stops_at_once_with_everything_saved(image_folder, tmp_path, uninterrupted):
    run = tmp_path / "run"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "import metric_kd.cli.goals as goals\n"
        "evaluate = goals.evaluate_retrieval\n"
        "def slowly(*args, **kwargs):\n"
        "    time.sleep(60)\n"
        "    return evaluate(*args, **kwargs)\n"
        "goals.evaluate_retrieval = slowly\n"
    )
    common = flags(image_folder, run, "--epochs", "6", "--iter_per_epoch", "12", "--save_minutes", "60")
    process = start([*common, "--plugins", str(slow)])
    wait_for(lambda: step_of(run) >= 12, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    main(common)
    assert equal(weights(run), weights(uninterrupted))
