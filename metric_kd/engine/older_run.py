"""Folders without a manifest (:mod:`metric_kd.engine.written`): what in them we wrote, as their content shows."""

from pathlib import Path
from typing import Any

import yaml

from metric_kd.engine.checkpoint import FORMAT, read_checkpoint
from metric_kd.errors import UserError
from metric_kd.plain import parse_json, parse_yaml
from metric_kd.scratch import is_plain

KEYS = frozenset({"dataset", "data", "epochs", "batch", "seed"})
"""Keys that every config.yaml of a run has."""
OUTPUTS = {
    "evidence.json": {"student", "teacher", "dataset"},
    "analysis.json": {"student", "teacher", "student_layers", "cka"},
    "compatibility.json": {"student", "teacher", "matrix", "verdict"},
}
"""What commands write beside a run, and keys that it has."""
PICTURES = {"cka.png": "analysis.json"}
"""Files that tell nothing of themselves, and what is written just before."""


def names_in(folder: Path) -> list[str]:
    """The names that a run of a version before manifests wrote; none where there is no such run.

    A run has a config.yaml that is one, and a best.pth or last.pth that is a checkpoint of this program.
    """
    config = _config(folder / "config.yaml")
    if config is None or not any(_is_checkpoint(folder / name) for name in ("best.pth", "last.pth")):
        return []
    names = ["config.yaml", "best.pth", "last.pth", "metrics.jsonl", "result.txt", "card.json"]
    names += [f"peer{k}.pth" for k in range(1, 1 + len(config.get("mutual") or []))]
    if config.get("record_weights") is not None:
        names.append("weights/distances.json")
        recorded = [f"weights/epoch{epoch:04d}.pth" for epoch in _recorded(folder / "weights")]
        names += [name for name in recorded if _is_checkpoint(folder / name)]
    found = [name for name in names if is_plain(folder / name)]
    return found + [name for name in (*OUTPUTS, *PICTURES) if is_output(folder / name)]


def is_output(file: Path) -> bool:
    """Whether a file is what a command of ours writes beside a run under this name."""
    if file.name in PICTURES:
        return is_plain(file) and is_output(file.with_name(PICTURES[file.name]))
    return OUTPUTS[file.name] <= read_object(file).keys()


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none."""
    try:
        content = parse_json(file.read_bytes()) if is_plain(file) else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _config(file: Path) -> dict[str, Any] | None:
    try:
        content = parse_yaml(file.read_text()) if is_plain(file) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) and content.keys() >= KEYS else None


def _is_checkpoint(file: Path) -> bool:
    try:
        return is_plain(file) and read_checkpoint(file).get("format") == FORMAT
    except UserError:
        return False


def _recorded(folder: Path) -> list[int]:
    """The epochs of checkpoints by their names, as they are written."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    numbers = [path.stem.removeprefix("epoch") for path in folder.glob("epoch*.pth")]
    return sorted(int(number) for number in numbers if number.isascii() and number.isdigit())
