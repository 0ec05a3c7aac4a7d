"""From a command line, a YAML file and a preset to a config; every unknown key is refused with a suggestion."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from metric_kd.cli.config import COMMANDS, RunConfig, known_keys
from metric_kd.errors import UserError, one_of


class Parsed(NamedTuple):
    """A config, and the names of the keys that the user set (by flag, file or preset)."""

    config: RunConfig
    given: frozenset[str]


def presets() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("metric_kd.presets").iterdir() if p.name.endswith(".yaml")
    )


def parse(command: str, arguments: Sequence[str], program: str | None = None) -> Parsed:
    """Defaults, then --preset, then --config, then the flags; the later wins."""
    tokens = [underscored(token) for token in arguments]
    _check_flags(command, tokens)
    parser = _parser(command, program)
    values: dict[str, Any] = {}
    for name in _values_of(tokens, "--preset"):
        if name not in presets():
            raise one_of("preset", name, presets())
        text = resources.files("metric_kd.presets").joinpath(f"{name}.yaml").read_text()
        values |= _from_yaml(command, text, f"preset {name}")
    for path in _values_of(tokens, "--config"):
        if not Path(path).is_file():
            raise UserError(f"--config {path} does not exist; check the path.")
        values |= _from_yaml(command, Path(path).read_text(), path)
    try:
        parser.set_defaults(dict(values))
        namespace = parser.parse_args(tokens)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_sentence(error)) from None
    chosen = {key: getattr(namespace, key) for key in known_keys(command)}
    flags = {token[2:].split("=")[0] for token in tokens if token.startswith("--")}
    if namespace.loss is not None and "loss" in values and "loss" in flags:
        chosen["loss"] = namespace.loss[len(values["loss"]) :] or namespace.loss  # flags replace, they do not append
    given = frozenset(flags | set(values)) & set(chosen)
    return Parsed(COMMANDS[command](**chosen), given)


def underscored(token: str) -> str:
    """--lr-decay-epochs is --lr_decay_epochs; values are left alone."""
    match = re.match(r"--([A-Za-z][\w-]*)(=.*)?$", token, re.DOTALL)
    return f"--{match[1].replace('-', '_')}{match[2] or ''}" if match else token


def _check_flags(command: str, tokens: Sequence[str]) -> None:
    known = [*known_keys(command), "config", "preset", "help", "print_config"]
    for token in tokens:
        if token.startswith("--"):
            name = token[2:].split("=")[0]
            if name not in known:
                raise one_of("flag", f"--{name}", [f"--{key}" for key in known])


def _values_of(tokens: Sequence[str], name: str) -> list[str]:
    found = []
    for position, token in enumerate(tokens):
        if token == name and position + 1 < len(tokens):
            found.append(tokens[position + 1])
        elif token.startswith(f"{name}="):
            found.append(token.partition("=")[2])
    return found


def _from_yaml(command: str, text: str, where: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no valid YAML ({str(error).splitlines()[0]}); mend it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold a map of flags to values.")
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in content:
        if key not in known_keys(command):
            raise one_of(f"key in {where}:", key, known_keys(command))
    for key, value in content.items():
        if isinstance(value, str) and _is_number_field(command, key):
            content[key] = yaml.safe_load(re.sub(r"^([+-]?\d+)[eE]", r"\1.0e", value))
            content[key] = float(value) if isinstance(content[key], str) and _is_float(value) else content[key]
    if content.get("loss") is not None:
        from metric_kd.losses.objective import parse_loss

        losses = content["loss"] if isinstance(content["loss"], list) else [content["loss"]]
        content["loss"] = [loss if isinstance(loss, str) else str(parse_loss(loss)) for loss in losses]
    return content


def _is_number_field(command: str, key: str) -> bool:
    kind = {f.name: f.type for f in dataclasses.fields(COMMANDS[command])}[key]
    return kind in (float, int)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parser(command: str, program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    kind = COMMANDS[command]
    parser = ArgumentParser(
        prog=program or f"metric-kd {command}", description=kind.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=str, help="YAML file of flags; a run's config.yaml repeats the run")
    parser.add_argument("--preset", type=str, help=f"recipe of a paper: {', '.join(presets())}")
    for key in dataclasses.fields(kind):
        default = key.default_factory() if key.default is dataclasses.MISSING else key.default  # type: ignore[misc]
        options: dict[str, Any] = {"default": default, "help": key.metadata["help"]}
        if key.name in ("loss", "plugins"):
            parser.add_argument(f"--{key.name}", type=str, action="append", **options)
        elif key.type == list[int]:
            parser.add_argument(f"--{key.name}", type=int, nargs="+", **options)
        else:
            parser.add_argument(f"--{key.name}", type=key.type, **options)
    return parser


def _one_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = re.sub(r'(?:Parser key|argument) "?-*(\w+)"?(?: element \d+)?:', r"--\1:", text)
    text = (
        text.replace("typing.Literal", "one of ")
        .replace("<class 'float'>", "number")
        .replace("<class 'int'>", "integer")
    )
    text = (
        text.replace("<class 'bool'>", "true or false")
        .replace("Expected a", "expected")
        .replace(". Got value:", ", got")
    )
    return text.rstrip(".") + "; see --help."
