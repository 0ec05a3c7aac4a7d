"""fetch: mirrors, resume, checksum. extract: whole or absent, never outside."""

import hashlib
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest

from metric_kd.data.download import Source, extract, fetch, obtain
from metric_kd.errors import UserError

BODY = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(BODY).hexdigest()


def get(urls, target, md5=MD5):
    return fetch(urls, target, md5, timeout=5, progress=False)


def test_a_file_is_fetched_into_a_new_folder(server, tmp_path):
    server.files["/a.bin"] = BODY
    target = get([server.url("/a.bin")], tmp_path / "new" / "a.bin")
    assert target.read_bytes() == BODY
    assert os.listdir(target.parent) == ["a.bin"]


def test_a_cut_connection_is_resumed_where_it_broke_off(server, tmp_path):
    server.files["/a.bin"] = BODY
    server.cuts = [100_000, 50_000]
    get([server.url("/a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [r for _, r in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_goes_on_from_the_part(server, tmp_path):
    server.files["/a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY[:1234])
    get([server.url("/a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.requests == [("/a.bin", "bytes=1234-")]


def test_a_complete_part_is_taken_without_another_byte(server, tmp_path):
    server.files["/a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY)
    get([server.url("/a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert len(server.requests) == 1


@pytest.mark.parametrize("rubbish", [b"x" * 500, b"x" * 400_000], ids=["shorter", "longer"])
def test_a_part_of_another_file_is_thrown_away(server, tmp_path, rubbish):
    server.files["/a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(rubbish)
    get([server.url("/a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_server_that_ignores_ranges_is_read_from_the_start(server, tmp_path):
    server.files["/a.bin"] = BODY
    server.ranges = False
    server.cuts = [100_000]
    get([server.url("/a.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_dead_mirrors_are_passed_over(server, tmp_path):
    server.files["/b.bin"] = BODY
    dead = "http://127.0.0.1:1/a.bin"
    get([dead, server.url("/missing.bin"), server.url("/b.bin")], tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_mirror_that_always_breaks_off_is_given_up(server, tmp_path):
    server.files["/a.bin"] = server.files["/b.bin"] = BODY
    server.cuts = [0] * 10
    with pytest.raises(UserError, match="breaks off"):
        get([server.url("/a.bin")], tmp_path / "a.bin")
    server.cuts = []
    assert get([server.url("/b.bin")], tmp_path / "a.bin").read_bytes() == BODY


def test_a_wrong_file_is_given_up_also_where_every_connection_breaks_off(server, tmp_path):
    server.files["/a.bin"] = b"x" * 1000
    (tmp_path / "a.bin.part").write_bytes(b"y" * 100)
    server.cuts = [400] * 20
    with pytest.raises(UserError, match="md5"):
        get([server.url("/a.bin")], tmp_path / "a.bin")
    assert len(server.requests) < 8 and os.listdir(tmp_path) == []


def test_a_wrong_checksum_gives_no_file(server, tmp_path):
    server.files["/a.bin"] = b"another file"
    with pytest.raises(UserError, match="md5") as caught:
        get([server.url("/a.bin")], tmp_path / "a.bin")
    assert f"put this file here: {tmp_path / 'a.bin'}" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_offline_says_in_one_line_what_to_put_where_and_leaves_nothing(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with pytest.raises(UserError, match="cannot download a.bin") as caught:
        fetch(["http://127.0.0.1:1/a.bin"], target, MD5, page="https://example.org/a", progress=False)
    assert f"get it from https://example.org/a and put this file here: {target}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def tar_of(path, entries):
    with tarfile.open(path, "w:gz") as file:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                file.addfile(info)
    return path


def zip_of(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            if isinstance(content, bytes):
                file.writestr(name, content)
            else:
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16
                file.writestr(info, content[1])
    return path


PACKERS = [pytest.param(tar_of, id="tar"), pytest.param(zip_of, id="zip")]


@pytest.mark.parametrize("pack", PACKERS)
def test_the_inner_folder_becomes_the_folder(pack, tmp_path):
    archive = pack(tmp_path / "a", [("data/x/1.txt", b"one"), ("data/2.txt", b"two"), ("stray.txt", b"")])
    folder = extract(archive, tmp_path / "out" / "data", "data")
    assert (folder / "x" / "1.txt").read_bytes() == b"one"
    assert sorted(os.listdir(tmp_path / "out")) == ["data"]
    whole = extract(archive, tmp_path / "whole")
    assert sorted(os.listdir(whole)) == ["data", "stray.txt"]
    assert whole.stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize(
    "entry",
    [
        ("../evil.txt", b"x"),
        ("a/../../evil.txt", b"x"),
        ("/evil.txt", b"x"),
        ("data/link", (tarfile.SYMTYPE, "/etc/passwd")),
    ],
    ids=["parent", "inside parent", "absolute", "link"],
)
def test_what_would_leave_the_folder_is_refused_and_nothing_stays(pack, entry, tmp_path):
    archive = pack(tmp_path / "a", [("data/1.txt", b"one"), entry])
    with pytest.raises(UserError, match="do not trust"):
        extract(archive, tmp_path / "out" / "data", "data")
    assert os.listdir(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]


def test_a_hard_link_in_a_tar_is_refused(tmp_path):
    archive = tar_of(tmp_path / "a", [("data/1", b"x"), ("data/2", (tarfile.LNKTYPE, "../../a"))])
    with pytest.raises(UserError, match="do not trust"):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", PACKERS)
def test_a_truncated_archive_leaves_nothing(pack, tmp_path):
    archive = pack(tmp_path / "a", [("data/1.bin", BODY)])
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        extract(archive, tmp_path / "out", "data")
    assert os.listdir(tmp_path) == ["a"]


def test_an_archive_without_the_folder_is_refused(tmp_path):
    archive = tar_of(tmp_path / "a", [("other/1.txt", b"")])
    with pytest.raises(UserError, match="holds no folder 'data'"):
        extract(archive, tmp_path / "data", "data")


def source_of(archive, url="http://127.0.0.1:1/a.tgz"):
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    return Source("a.tgz", md5, (url,), "data", "https://example.org")


def test_obtain_downloads_unpacks_and_then_finds(server, tmp_path):
    archive = tar_of(tmp_path / "a.tgz", [("data/1.txt", b"one")])
    server.files["/a.tgz"] = archive.read_bytes()
    source = source_of(archive, server.url("/a.tgz"))
    root = tmp_path / "root"
    assert (obtain(root, source) / "1.txt").read_bytes() == b"one"
    (root / "a.tgz").unlink()
    assert obtain(root, source, download=False) == root / "data"
    assert len(server.requests) == 1


def test_obtain_takes_an_archive_that_lies_there_only_if_it_is_right(tmp_path):
    archive = tar_of(tmp_path / "a.tgz", [("data/1.txt", b"one")])
    source = source_of(archive)
    archive.write_bytes(archive.read_bytes() + b"more")
    with pytest.raises(UserError, match=r"a\.tgz has the md5 .* instead of"):
        obtain(tmp_path, source)
    assert not (tmp_path / "data").exists()
    archive.write_bytes(archive.read_bytes()[:-4])
    assert (obtain(tmp_path, source) / "1.txt").exists()


def test_obtain_without_download_names_the_place(tmp_path):
    archive = tar_of(tmp_path / "a.tgz", [("data/1.txt", b"one")])
    with pytest.raises(UserError, match="put this file here"):
        obtain(tmp_path / "root", source_of(archive), download=False)
    assert not (tmp_path / "root").exists()
