"""What a second start finds in a run directory, whatever a crash or a person left there."""

import json

import pytest
import torch
from tiny import TINY

from metric_kd.cli.train import main
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.written import Written
from metric_kd.errors import UserError


@pytest.fixture
def run(image_folder, tmp_path):
    """(directory, start): ``start(flags)`` trains into the directory."""

    def start(*flags: str) -> None:
        main([*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "run"), *flags])

    return tmp_path / "run", start


def epochs_of(folder) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_of_a_run_that_was_killed_before_its_first_checkpoint_are_dropped(run):
    folder, start = run
    folder.mkdir()
    Written(folder).add(["config.yaml", "metrics.jsonl"])
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n{"epoch": 2, "lo')
    start()
    assert epochs_of(folder) == [1, 2]
    assert "Final Recall@1" in (folder / "result.txt").read_text()


@pytest.mark.parametrize("config", [None, "", "a: [", "3"])
def test_without_a_readable_config_the_checkpoint_still_knows_its_run(run, config):
    folder, start = run
    start()
    (folder / "result.txt").unlink()
    if config is None:
        (folder / "config.yaml").unlink()
    else:
        (folder / "config.yaml").write_text(config)
    with pytest.raises(UserError, match="with seed 0, this one has 5"):
        start("--seed", "5")
    start()
    assert (folder / "result.txt").exists()


def test_a_last_pth_that_is_no_checkpoint_of_a_run_is_not_resumed(run):
    folder, start = run
    folder.mkdir()
    Written(folder).add(["config.yaml", "last.pth"])
    torch.save({"linear.weight": torch.ones(2)}, folder / "last.pth")
    with pytest.raises(UserError, match="no checkpoint of a run"):
        start()
    (folder / "last.pth").write_bytes(b"PK half")
    with pytest.raises(UserError, match="--resume never"):
        start()
    start("--resume", "never")


def test_resume_never_is_not_part_of_the_config(run):
    folder, start = run
    start("--resume", "never")
    before = (folder / "best.pth").stat().st_mtime_ns
    main(["--config", str(folder / "config.yaml")])
    assert (folder / "best.pth").stat().st_mtime_ns == before, "feeding the config back must not start over"


def test_fewer_epochs_than_were_trained_are_refused_and_nothing_changes(run):
    folder, start = run
    start("--epochs", "3")
    (folder / "result.txt").unlink()
    config = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match="has trained 3 epochs, more than --epochs 2"):
        start("--epochs", "2")
    assert (folder / "config.yaml").read_text() == config


def test_a_damaged_card_means_that_the_result_is_written_again(run):
    folder, start = run
    start()
    text = (folder / "result.txt").read_text()
    (folder / "result.txt").write_text("old\n")
    (folder / "card.json").write_text("{")
    start()
    assert (folder / "result.txt").read_text() == text
    assert RunDirectory(folder).card_content()["epochs"] == 2


def test_another_teacher_is_a_warning(image_folder, teacher_run, tmp_path, capsys):
    from metric_kd.cli.distill import main as distill

    teacher = tmp_path / "teacher.pth"
    content = read_checkpoint(teacher_run)
    write_checkpoint(teacher, {key: value for key, value in content.items() if key != "format"})
    flags = [*TINY, "--data", str(image_folder), "--save_dir", str(tmp_path / "run"), "--dist_ratio", "1"]
    distill([*flags, "--teacher_load", str(teacher), "--epochs", "1"])
    content["model"]["linear.bias"] += 1
    write_checkpoint(teacher, {key: value for key, value in content.items() if key != "format"})
    capsys.readouterr()
    distill([*flags, "--teacher_load", str(teacher), "--epochs", "2"])
    captured = capsys.readouterr()
    assert "written with teacher" in captured.out + captured.err


def test_the_flag_that_named_the_directory_is_the_one_that_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="^--out .*file is a file; give a folder.$"):
        RunDirectory(tmp_path / "file", "--out").check_writable()
    with pytest.raises(UserError, match="^--out /proc/nowhere is not writable"):
        RunDirectory("/proc/nowhere", "--out").check_writable()
