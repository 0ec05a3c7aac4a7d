"""Plugins that a run was made with: named to the user, never imported because a file that was read names them."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from metric_kd.errors import UnknownName, UserError
from metric_kd.plain import parse_yaml


def plugins_of(config: Mapping[str, Any]) -> list[str]:
    """What a config says under ``plugins``, as text."""
    found = config.get("plugins") or []
    return [str(entry) for entry in (found if isinstance(found, list) else [found])]


def unnamed(stored: Sequence[str], named: Sequence[str]) -> list[str]:
    """Those of ``stored`` that the user did not name; a file may lie elsewhere by now, so its own name counts."""
    known = {_own_name(plugin) for plugin in named}
    return [plugin for plugin in stored if _own_name(plugin) not in known]


def ask_for(run: "str | Path", plugins: Sequence[str]) -> UserError:
    """The sentence that says what a run was made with and what to add."""
    several = "s" if len(plugins) > 1 else ""
    them = "them" if several else "it"
    flags = " ".join(f"--plugins {plugin}" for plugin in plugins)
    return UserError(
        f"the run {run} was made with the plugin{several} {', '.join(plugins)}, which a run may not import by itself; add "
        f"{flags} if you trust {them} (in Python, import {them} first)."
    )


def check_named(run: "str | Path", config: Mapping[str, Any], named: Sequence[str]) -> None:
    """Raise ``UserError`` where a run was made with plugins that the user has not named."""
    if missing := unnamed(plugins_of(config), named):
        raise ask_for(run, missing)


@contextmanager
def explained(*paths: "str | Path | None") -> Iterator[None]:
    """An unknown name while the runs behind these paths are opened is put down to plugins of theirs that are not imported."""
    try:
        yield
    except UnknownName as error:
        for path in paths:
            missing = [] if path is None else [p for p in _stored(Path(path)) if not _imported(p)]
            if missing:
                raise ask_for(path or "", missing) from error
        raise


def _stored(path: Path) -> list[str]:
    """The plugins of the run to which a directory, or a checkpoint in it or in its record of weights, belongs."""
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent) if folder.name == "weights" else (folder,):
        try:
            content = parse_yaml((place / "config.yaml").read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        return plugins_of(content) if isinstance(content, dict) else []
    return []


def _imported(plugin: str) -> bool:
    name = _own_name(plugin)
    return bool({plugin, name, f"metric_kd_plugin_{name}"} & sys.modules.keys())


def _own_name(plugin: str) -> str:
    return Path(plugin).stem if plugin.endswith(".py") else plugin.rpartition(".")[2]
