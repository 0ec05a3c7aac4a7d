"""Files that a command writes without being given their names: they replace nothing that such a command did not write."""

from pathlib import Path

from metric_kd.engine.older_run import read_object
from metric_kd.errors import UserError
from metric_kd.scratch import is_plain

HEAD = 4096
"""Bytes at the beginning of a text file that show what it is."""


def check_table(out: Path) -> None:
    """FILE.csv, the names of the images in FILE.npy."""
    table = out.with_suffix(".csv")
    _check(table, _head(table).startswith(("path\n", "path\r\n")), "table of the names of images")


def check_export(out: Path, named: bool) -> None:
    """The cards of an exported file, and the file itself where its name was not given."""
    card, text = Path(f"{out}.json"), Path(f"{out}.md")
    ours = {"file", "network", "contract", "export"} <= read_object(card).keys()
    _check(card, ours, "card of an exported network")
    _check(text, "exported as" in _head(text) and "by metric_kd" in _head(text), "card of an exported network")
    if not named:
        _check(out, ours, "exported network with its card")


def check_page(out: Path) -> None:
    """A page whose name was not given."""
    _check(out, '<meta name="generator" content="metric_kd">' in _head(out), "page of this program")


def _check(file: Path, ours: bool, what: str) -> None:
    if (file.exists() or file.is_symlink()) and not (ours and is_plain(file)):
        raise UserError(f"{file} is there and is no {what}; move it away, or give another --out.")


def _head(file: Path) -> str:
    if not is_plain(file):
        return ""
    with file.open("rb") as content:
        return content.read(HEAD).decode(errors="replace")
