"""The bytes of files that hold weights: sealed with a digest when they are written, checked before anything reads them.

A sealed file ends in "metric_kd sha256 " and 64 hexadecimal digits: the SHA-256 of every byte before them. In a zip
archive (.pth, .pt2) this is the archive's comment, in an ONNX file the model's doc_string: other programs open either as
before. Files without a seal are those of older versions and of others; where they are zip archives, the CRC-32 of
every member is checked. What is neither (torch.save's old format, ONNX of others) holds nothing to check it by.
"""

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metric_kd.errors import UserError

MARK = b"metric_kd sha256 "
DIGITS = 64
SEAL = len(MARK) + DIGITS
ZIP, ZIP_END = b"PK\3\4", b"PK\5\6"
FOLDER = 0x10
"""In the attributes of a member of an archive."""
DOC_STRING = bytes([6 << 3 | 2, SEAL])
"""How the field doc_string (6) of an ONNX model begins whose text has the length of a seal."""
SEAL_FOLLOWS = "metric_kd sha256: at the end"
"""The doc_string of an ONNX model in front of its seal, which replaces it: whoever reads it has a model cut short."""


def seal_archive(file: BinaryIO) -> None:
    """Seal a zip archive without a comment, which is open for reading and writing."""
    file.seek(-2, io.SEEK_END)
    file.write(SEAL.to_bytes(2, "little") + MARK)  # a comment is the last part of an archive, after its length
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    file.write(digest.hexdigest().encode())


def sealed_onnx(model: bytes) -> bytes:
    """A serialised ONNX model, whose doc_string is ``SEAL_FOLLOWS``, with its seal."""
    content = model + DOC_STRING + MARK
    return content + hashlib.sha256(content).hexdigest().encode()


def is_sealed(content: bytes) -> bool:
    """Whether a file says what its digest is; not whether it is right."""
    return content[-SEAL:-DIGITS] == MARK


def read_checked(path: Path, called: str, mend: str) -> bytes:
    """All bytes of a file. Raises ``UserError``, naming it as ``called`` and ending in what to do, where it is damaged.

    Whoever needs the content makes it from these bytes: the file itself may be another one by then.
    """
    if not path.is_file():
        raise UserError(f"{called} is {'no file' if path.exists() else 'not there'}; give a file of weights.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{called} cannot be read ({error.strerror}); permit it, or {mend}.") from error
    damage = damage_in(content)
    if damage:
        raise UserError(f"{called} is damaged: {damage}; {mend}.")
    return content


def read_tensors(path: Path, called: str, mend: str) -> Any:
    """What torch.save wrote, on the CPU, without running code that is in it.

    Raises as :func:`read_checked`, and whatever the bytes of a file lead to that cannot be checked.
    """
    content = read_checked(path, called, mend)
    stream = io.BytesIO(content)
    found = torch.load(stream, map_location="cpu", weights_only=True)
    if not content.startswith(ZIP) and stream.read(1):
        raise UserError(f"{called} is damaged: something follows its end; {mend}.")
    return found


def damage_in(content: bytes) -> str:
    """What is wrong with the bytes of a file, in words; empty where nothing is, or nothing can be known."""
    if not content:
        return "it is empty"
    if is_sealed(content):
        whole = hashlib.sha256(memoryview(content)[:-DIGITS]).hexdigest().encode() == content[-DIGITS:]
        return "" if whole else "its contents do not match its digest"
    return _damage_in_archive(content) if content.startswith(ZIP) else ""


def _damage_in_archive(content: bytes) -> str:
    """What is wrong by the checksums of its members, where it has any: PyTorch can be told to write none."""
    end = content.rfind(ZIP_END)
    length = int.from_bytes(content[end + 20 : end + 22], "little")  # of the comment
    if end < 0 or end + 22 + length > len(content):
        return "it is cut short"
    if end + 22 + length < len(content):
        return "something follows its end"
    if length:
        return "its digest is not one that metric_kd writes"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if min(member.header_offset for member in members) > 0:
                return "something precedes its beginning"
            names = [member.filename for member in members]
            if len(set(names)) < len(names):
                return "it holds two parts of one name"
            if any(member.external_attr & FOLDER and not member.is_dir() for member in members):
                return "one of its parts is marked as a folder"  # PyTorch would read nothing there, and not say so
            if not any(member.CRC for member in members):
                return ""
            part = archive.testzip()
            return "" if part is None else f"the checksum of its part {part!r} is wrong"
    except Exception as error:  # the bytes of a damaged archive lead to many types
        reason = re.sub(r"\s+", " ", str(error) or type(error).__name__).rstrip(".")
        return f"it is no whole archive ({reason[:120]})"
