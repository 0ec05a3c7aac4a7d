"""Files of weights: no damage is read in silence, whatever byte it is in; what has no digest is checked as far as it can be."""

import io
import os
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.errors import UserError
from metric_kd.models.weight_file import DIGITS, SEAL, damage_in, is_sealed, read_tensors, seal_archive

CONTENT = {
    "network": {"base": "resnet8"},
    "model": {
        "a.weight": torch.arange(350.0).reshape(50, 7),
        "half": torch.ones(33, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.empty(0, 4),
    },
    "metrics": [0.25, "x", None, (1, 2)],
}
KINDS = ("sealed", "plain", "bare")


def written(kind: str, file: Path) -> bytes:
    """A checkpoint of today, one without a digest, or a state dict of others."""
    if kind == "sealed":
        write_checkpoint(file, CONTENT)
    else:
        torch.save({"format": "metric_kd checkpoint 1", **CONTENT} if kind == "plain" else CONTENT["model"], file)
    return file.read_bytes()


def same(found, wanted) -> bool:
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    return found == wanted


def flips(whole: bytes, count: int, seed: int):
    """Copies with 1 to 4 wrong bytes, evenly spread over the file."""
    generator = random.Random(seed)
    for k in range(count):
        at, damaged = k * (len(whole) - 4) // (count - 1), bytearray(whole)
        for place in range(at, at + generator.choice([1, 1, 2, 4])):
            damaged[place] ^= generator.randrange(1, 256)
        yield bytes(damaged)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_anywhere_are_refused_or_do_not_matter(kind, tmp_path):
    file = tmp_path / "best.pth"
    whole = written(kind, file)
    wanted = read_checkpoint(file)
    refused = 0
    for damaged in flips(whole, 400, seed=KINDS.index(kind)):
        file.write_bytes(damaged)
        try:
            assert same(read_checkpoint(file), wanted)
        except UserError as error:
            refused += 1
            assert re.fullmatch(rf"the checkpoint {re.escape(str(file))} [^\n]*\.", str(error))
    assert refused == 400 if kind == "sealed" else refused > 250


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_bytes_within_a_tensor_are_always_refused(kind, tmp_path):
    file = tmp_path / "teacher.pth"
    whole = written(kind, file)
    start = whole.index(CONTENT["model"]["a.weight"].numpy().tobytes())
    expected = "do not match its digest" if kind == "sealed" else "checksum of its part '.*/data/0' is wrong"
    for at in range(start, start + 1400 - 4, 37):
        file.write_bytes(whole[:at] + bytes(b ^ 0x40 for b in whole[at : at + 4]) + whole[at + 4 :])
        with pytest.raises(UserError, match=rf"the teacher .*teacher\.pth is damaged: .*{expected}; copy it again"):
            read_checkpoint(file, "teacher")


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_short_or_continued_are_refused(kind, tmp_path):
    file = tmp_path / "best.pth"
    whole = written(kind, file)
    ends = {
        *range(0, len(whole), 101),
        *(len(whole) - k for k in (1, 2, 22, DIGITS, SEAL - 1, SEAL, SEAL + 1, SEAL + 22)),
    }
    for content in (*(whole[:end] for end in ends), whole + b"\0", whole + b"more", whole + whole, whole[3:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"the checkpoint .*best\.pth"):
            read_checkpoint(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="it is empty; copy it again or train again"):
        read_checkpoint(file)


def test_other_programs_open_a_sealed_file(tmp_path):
    whole = written("sealed", tmp_path / "best.pth")
    assert is_sealed(whole)
    for mapped in (False, True):
        found = torch.load(tmp_path / "best.pth", weights_only=True, mmap=mapped)
        assert same(found["model"], CONTENT["model"])
    with zipfile.ZipFile(tmp_path / "best.pth") as archive:
        assert archive.testzip() is None and archive.comment == whole[-SEAL:]


def test_the_same_content_is_the_same_file(tmp_path):
    assert written("sealed", tmp_path / "best.pth") == written("sealed", tmp_path / "best.pth")


def test_what_torch_save_wrote_again_opens_without_a_digest(tmp_path):
    written("sealed", tmp_path / "best.pth")
    torch.save(torch.load(tmp_path / "best.pth", weights_only=True), tmp_path / "again.pth")
    assert not is_sealed((tmp_path / "again.pth").read_bytes())
    assert same(read_checkpoint(tmp_path / "again.pth")["model"], CONTENT["model"])


def resealed(whole: bytes, comment: bytes) -> bytes:
    """A sealed archive with another comment."""
    return whole[: -SEAL - 2] + struct.pack("<H", len(comment)) + comment


@pytest.mark.parametrize(
    "comment, sentence",
    [
        (b"metric_kd sha256 " + b"0" * 64, "do not match its digest"),
        (b"metric_kd sha256 " + b"\xff" * 64, "do not match its digest"),
        (b"metric_kd sha256 " + b"0" * 63, "not one that metric_kd writes"),
        (b"metric_kd md5 " + b"0" * 32, "not one that metric_kd writes"),
        (b"17", "not one that metric_kd writes"),
    ],
)
def test_digests_that_are_wrong_or_of_another_form(comment, sentence, tmp_path):
    whole = written("sealed", tmp_path / "best.pth")
    (tmp_path / "best.pth").write_bytes(resealed(whole, comment))
    with pytest.raises(UserError, match=f"best.pth is damaged: .*{sentence}"):
        read_checkpoint(tmp_path / "best.pth")


def test_digests_of_another_case_or_another_file(tmp_path):
    whole = written("sealed", tmp_path / "best.pth")
    write_checkpoint(tmp_path / "other.pth", {"model": {"w": torch.ones(2)}})
    for digits in (whole[-DIGITS:].upper(), (tmp_path / "other.pth").read_bytes()[-DIGITS:]):
        (tmp_path / "best.pth").write_bytes(whole[:-DIGITS] + digits)
        with pytest.raises(UserError, match="do not match its digest"):
            read_checkpoint(tmp_path / "best.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name(tmp_path):
    for kind, sentence in (("sealed", "do not match its digest"), ("plain", "two parts of one name")):
        file = tmp_path / "best.pth"
        written(kind, file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("best/data/0", b"\1" * 1400)
        with pytest.raises(UserError, match=f"best.pth is damaged: .*{sentence}"):
            read_checkpoint(file)


def test_a_part_that_is_marked_as_a_folder(tmp_path):
    """PyTorch reads nothing there, leaves the tensor as the memory was, and says nothing."""
    whole = bytearray(written("plain", tmp_path / "best.pth"))
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(b"best/data/0"))
    whole[entry + 38] |= 0x10
    (tmp_path / "best.pth").write_bytes(whole)
    with pytest.raises(UserError, match="marked as a folder"):
        read_checkpoint(tmp_path / "best.pth")


def test_files_of_others_without_any_checksum_open(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT["model"], tmp_path / "fast.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(CONTENT["model"], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        written("bare", tmp_path / "bare.pth")
        with zipfile.ZipFile(tmp_path / "bare.pth") as archive:
            for name in archive.namelist():
                packed.writestr(name, archive.read(name))
    for name in ("fast", "old", "packed"):
        assert same(read_checkpoint(tmp_path / f"{name}.pth")["model"], CONTENT["model"])
    with (tmp_path / "old.pth").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="something follows its end"):
        read_checkpoint(tmp_path / "old.pth")


def test_what_is_no_file_of_bytes(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="pipe.pth is neither a file nor a folder"):
        read_checkpoint(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match="folder.pth is a folder without best.pth"):
        read_checkpoint(tmp_path / "folder.pth")
    for name in ("pipe.pth", "folder.pth", "none.pth"):
        with pytest.raises(UserError, match=f"{name} is "):
            read_tensors(tmp_path / name, f"the file {name}", "get it again")


def test_what_is_read_is_what_was_checked(tmp_path, monkeypatch):
    """The file is another one as soon as it has been checked."""
    file, other = tmp_path / "best.pth", tmp_path / "other.pth"
    written("sealed", file)
    write_checkpoint(other, {"model": {"w": torch.full((2,), 666.0)}})
    load = torch.load

    def replaced(*arguments, **named):
        shutil.copy(other, file)
        return load(*arguments, **named)

    monkeypatch.setattr(torch, "load", replaced)
    assert same(read_checkpoint(file)["model"], CONTENT["model"])


def test_an_archive_in_memory_is_sealed_alike():
    stream = io.BytesIO()
    torch.save(CONTENT, stream)
    assert damage_in(stream.getvalue()) == "" and not is_sealed(stream.getvalue())
    seal_archive(stream)
    assert damage_in(stream.getvalue()) == "" and is_sealed(stream.getvalue())
