"""Checkpoints are whole, atomic, and opened without running what is in them."""

import os
import pickle

import pytest
import torch

from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint, write_atomically, write_checkpoint
from metric_kd.errors import UserError


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"model": {"w": torch.ones(2)}})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.pth"]


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/metric_kd_evil_was_run",))


def test_no_unrestricted_unpickling(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"model": Evil()}, path)
    with pytest.raises(UserError, match="no checkpoint of tensors"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert not os.path.exists("/tmp/metric_kd_evil_was_run")


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_truncated_files_are_refused_by_name(tmp_path, keep):
    path = tmp_path / "cut.pth"
    write_checkpoint(path, {"model": {"w": torch.ones(200)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"the teacher .*cut\.pth"):
        read_checkpoint(path, "teacher")


def test_plain_state_dicts_and_wrapped_ones(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save({"module.linear.weight": torch.ones(2)}, path)
    assert list(read_checkpoint(path)["model"]) == ["linear.weight"]
    torch.save({"state_dict": {"linear.weight": torch.ones(2)}}, path)
    assert list(read_checkpoint(path)["model"]) == ["linear.weight"]
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="no state dict"):
        read_checkpoint(path)


def test_a_run_directory_stands_for_its_result(tmp_path):
    with pytest.raises(UserError, match=r"without best\.pth"):
        find_checkpoint(tmp_path)
    (tmp_path / "last.pth").touch()
    assert find_checkpoint(tmp_path).name == "last.pth"
    (tmp_path / "best.pth").touch()
    assert find_checkpoint(tmp_path).name == "best.pth"
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
