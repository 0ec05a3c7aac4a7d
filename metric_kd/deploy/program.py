"""What a .pt2 file holds, looked at before PyTorch opens it: ``torch.export.load`` would run pickles and evaluate text."""

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from metric_kd.errors import UserError
from metric_kd.plain import parse_json

MEMBERS = re.compile(
    r"[^/]+/(?:data/(?:weights|constants|sample_inputs)/[^/]+|models/[^/]+\.json|extra/[^/]+|archive_format|archive_version"
    r"|byteorder|\.data/[^/]+|\.format_version|\.storage_alignment|version)"
)
TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|"
    r"_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
)
WORD = re.compile(
    r"(?:[su]\d+|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CleanDiv|Max|Min|Symbol|Integer|Rational|Eq|Ne|Lt|Le|Gt|Ge"
    r"|Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan"
    r"|And|Or|Not|positive|nonnegative|integer|True|False|true|false)"
)
SIGNS = re.compile(r"[\s\d()+\-*/,=<>']*")
"""What is left of an expression without its words."""


def check_program(path: Path, content: bytes) -> None:
    """Raise ``UserError`` for a program that is more than tensors and operators of PyTorch, and could run code.

    content: the bytes of the file, of which PyTorch is given the same.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):  # PyTorch might read the other one
            raise _more(path, "two members of one name")
        for name in names:
            if MEMBERS.fullmatch(name) is None:
                raise _more(path, f"the member {name!r}")
            if "/data/sample_inputs/" in name:
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except Exception as error:  # what its bytes lead to; PyTorch would unpickle it without limits then
                    raise _more(path, f"a pickle in {name!r}") from error
            elif name.endswith(".json") and "/extra/" not in name:
                _check(path, parse_json(archive.read(name)))


def _check(path: Path, content: Any) -> None:
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            for key, value in part.items():
                if key == "use_pickle" and value is not False:
                    raise _more(path, "pickled tensors")
                if key == "target" and isinstance(value, str) and "inputs" in part and not TARGET.fullmatch(value):
                    raise _more(path, f"the call {value[:80]!r}")
                if key == "expr_str" and not _is_expression(value):
                    raise _more(path, f"the expression {str(value)[:80]!r}")
            parts += part.values()


def _is_expression(text: Any) -> bool:
    if not isinstance(text, str) or len(text) > 10_000:
        return False
    words = re.findall(r"[^\W\d]\w*", text)
    return all(WORD.fullmatch(word) for word in words) and bool(SIGNS.fullmatch(re.sub(r"[^\W\d]\w*", "", text)))


def _more(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds {what}, which `metric-kd export` does not write and which could run code; export it again, or have it "
        "sent as .onnx."
    )
