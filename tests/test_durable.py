"""Whole writes, and names on the disk."""

import os

import pytest

from metric_kd.durable import pwrite_all, sync_folder


def test_all_is_written_however_little_the_system_takes_at_once(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:3], offset))
    handle = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    pwrite_all(handle, bytes(range(10)), 2)
    os.close(handle)
    assert (tmp_path / "file").read_bytes() == bytes(2) + bytes(range(10))


def test_the_folder_itself_is_flushed_and_no_handle_is_left(tmp_path, monkeypatch):
    flushed, handles = [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    sync_folder(tmp_path)
    assert flushed == [tmp_path.stat().st_ino] and len(os.listdir("/proc/self/fd")) == handles
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")
