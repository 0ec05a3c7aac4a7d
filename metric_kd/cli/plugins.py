"""Users' own files that register losses, methods, data sets or backbones."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from metric_kd.errors import UserError

_LOADED: set[str] = set()


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each Python file or module once; what it registers is then known by name like our own."""
    for plugin in plugins:
        key = str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin
        if key in _LOADED:
            continue
        if plugin.endswith(".py"):
            _load_file(Path(plugin))
        else:
            try:
                importlib.import_module(plugin)
            except ModuleNotFoundError as error:
                raise UserError(
                    f"--plugins {plugin}: no such module; give a .py file or an installed module."
                ) from error
        _LOADED.add(key)


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--plugins {path} does not exist; check the path.")
    name = f"metric_kd_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
