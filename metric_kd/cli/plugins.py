"""Users' own files that register losses, methods, data sets or backbones."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metric_kd.errors import UserError

_LOADED: set[str] = set()


def add_plugins(parser: Any) -> None:
    """The flag, for a command that opens runs: they may not import anything themselves."""
    parser.add_argument(
        "--plugins",
        type=str,
        action="append",
        default=[],
        help="Python file or module to import, repeatable, as of run.py",
    )


def load_plugins(plugins: Sequence[str]) -> None:
    """Import each Python file or module once; what it registers is then known by name like our own.

    Raises ``UserError`` for a file or module that is not there or fails, naming it.
    """
    for plugin in plugins:
        key = str(Path(plugin).resolve()) if plugin.endswith(".py") else plugin
        if key in _LOADED:
            continue
        if plugin.endswith(".py") and not Path(plugin).is_file():
            raise UserError(f"--plugins {plugin} does not exist; check the path.")
        try:
            if plugin.endswith(".py"):
                _load_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            if error.name == plugin:
                raise UserError(
                    f"--plugins {plugin}: no such module; give a .py file or an installed module."
                ) from error
            raise UserError(f"--plugins {plugin} needs the module {error.name!r}; install it.") from error
        except Exception as error:  # whatever the user's own code raises
            raise UserError(f"--plugins {plugin} cannot be imported: {type(error).__name__}: {error}.") from error
        _LOADED.add(key)


def _load_file(path: Path) -> None:
    name = f"metric_kd_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
