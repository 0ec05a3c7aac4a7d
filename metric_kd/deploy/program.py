"""What a .pt2 file holds, looked at before PyTorch opens it: ``torch.export.load`` would run pickles and evaluate text."""

import ast
import io
import json
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
NAME = re.compile(r"(?:[^\W\d]\w*)?")
"""What PyTorch writes into the source of a function as it stands: names of values and of arguments."""
PLAIN = re.compile(r"[\w.+\-:;>]*")
"""Any other text of a program: numbers of versions, devices, places of weights, where a value came from."""
TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
GUARD = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Subscript, ast.Attribute, ast.Call, ast.BoolOp, ast.BinOp),
    *(ast.UnaryOp, ast.Compare, ast.boolop, ast.operator, ast.unaryop, ast.cmpop),
)
"""Of what a condition on the sizes of the inputs is made: ``L['images'].size()[0] >= 2``."""


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
    parts = [("", content)]
    while parts:
        place, part = parts.pop()
        if isinstance(part, list):
            parts += [(place, each) for each in part]
        elif isinstance(part, dict):
            for key, value in part.items():
                if key == "use_pickle" and value is not False:
                    raise _more(path, "pickled tensors")
                if key.startswith(("as_custom_obj", "custom_obj")) and value:
                    raise _more(path, "an object of another library")
                if key == "target" and "inputs" in part and not (isinstance(value, str) and TARGET.fullmatch(value)):
                    raise _more(path, f"the call {str(value)[:80]!r}")
                if place.endswith("_values") and not NAME.fullmatch(key):
                    raise _more(path, f"the name {key[:80]!r}")
                if key == "metadata":
                    _check_metadata(path, value)
                else:
                    parts.append((key, value))
        elif isinstance(part, str) and not _is_harmless(place, part):
            raise _more(path, f"the text {part[:80]!r} as {place!r}")


def _check_metadata(path: Path, content: Any) -> None:
    """Raise ``UserError`` for what is said of a value that is more than where in whose source it came from."""
    for key, value in content.items() if isinstance(content, dict) else [("", content)]:
        if key not in ("stack_trace", "nn_module_stack", "torch_fn") and not (
            key == "source_fn_stack" and isinstance(value, str) and PLAIN.fullmatch(value.replace(",", ""))
        ):
            raise _more(path, f"{str(value)[:80]!r} of a value")


def _is_harmless(place: str, text: str) -> bool:
    """Whether PyTorch may be given this text, which it imports, evaluates or writes into source by its place."""
    if place == "expr_str":
        return _is_expression(text)
    if place == "guards_code":
        return _is_guard(text)
    if place in ("in_spec", "out_spec"):
        return _is_tree(text)
    if place in ("name", "as_name", "forward_arg_names"):
        return bool(NAME.fullmatch(text))
    return place == "as_string" or bool(PLAIN.fullmatch(text))


def _is_guard(text: str) -> bool:
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(text) <= 10_000 and all(
        isinstance(node, GUARD)
        and not (isinstance(node, ast.Name) and node.id != "L")
        and not (isinstance(node, ast.Attribute) and node.attr not in ("size", "stride", "storage_offset"))
        and not (
            isinstance(node, ast.Call) and (node.args or node.keywords or not isinstance(node.func, ast.Attribute))
        )
        and not (isinstance(node, ast.Constant) and isinstance(node.value, str) and not NAME.fullmatch(node.value))
        for node in ast.walk(tree)
    )


def _is_tree(text: str) -> bool:
    """Whether this is how values lie in tuples, lists and dicts, which names no other type and no member of an enum."""
    try:
        parts = [parse_json(text.encode())]
        while parts:
            part = parts.pop()
            if isinstance(part, list):
                parts += part
            elif isinstance(part, dict):
                context = json.loads(part["context"] or "null")
                if part["type"] not in TREES or not (context is None or isinstance(context, list)):
                    return False
                if any(not isinstance(key, str | int) for key in context or []):
                    return False
                parts += part["children_spec"]
            elif not isinstance(part, int):
                return False
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, UserError):
        return False
    return True


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
