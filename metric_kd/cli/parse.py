"""From a command line, a YAML file and a preset to a config; every unknown key is refused with a suggestion."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from metric_kd.cli.config import COMMANDS, NETWORK_FIELDS, RunConfig, known_keys
from metric_kd.cli.trust import in_a_run
from metric_kd.engine.run_plugins import check_named
from metric_kd.errors import UserError, one_of
from metric_kd.plain import parse_yaml


class Parsed(NamedTuple):
    """A config, and the names of the keys that the user set (by flag, file or preset)."""

    config: RunConfig
    given: frozenset[str]


RECIPES = ("train", "distill", "granularity", "probe")
"""The commands that train, for which there are presets."""


def presets() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("metric_kd.presets").iterdir() if p.name.endswith(".yaml")
    )


def parse(command: str, arguments: Sequence[str], program: str | None = None) -> Parsed:
    """Defaults, then --preset, then --config, then the flags; the later wins.

    What a file says is turned into flags, so that one parser checks all values alike. A classification without a preset
    starts from preset zoo: the defaults are those of metric learning. A probe starts from preset probe.
    """
    tokens = _explicit_booleans(command, [underscored(token) for token in arguments])
    _check_flags(command, tokens)
    files: list[dict[str, Any]] = [_preset(command, name) for name in _values_of(tokens, "--preset")]
    read: list[tuple[str, dict[str, Any]]] = []
    for path in _values_of(tokens, "--config"):
        if not Path(path).is_file():
            raise UserError(f"--config {path} does not exist; check the path.")
        content = _from_yaml(command, read_text(path), path)
        if "plugins" in content and in_a_run(path):  # it is read, whoever passes it
            read.append((path, {"plugins": content.pop("plugins")}))
        files.append(content)
    from_files = _layered(files)
    task = [from_files.get("task"), *_values_of(tokens, "--task")][-1]
    recipe = {"granularity": None, "probe": "probe"}.get(command, "zoo" if task == "classification" else None)
    implied = {} if recipe is None or _values_of(tokens, "--preset") else _preset(command, recipe)
    flags = frozenset(token[2:].split("=")[0] for token in tokens if token.startswith("--"))
    values = _layered([implied, from_files, dict.fromkeys(flags)])
    # What a flag gives need not come from a file as well: repeatable flags replace those of a file, they do not add to them.
    values = {key: value for key, value in values.items() if key not in flags}
    namespace = read_words(_parser(command, program), [*_as_flags(command, values), *tokens])
    config = COMMANDS[command](**{key: getattr(namespace, key) for key in known_keys(command)})
    for path, content in read:
        check_named(Path(path).parent, content, config.plugins)
    said = flags | set(from_files)
    if "lr_decay_epochs" in said and "lr_decay_at" not in said:  # it replaces the command's own shares as well
        config = dataclasses.replace(config, lr_decay_at=None)
    # A file describes the network of its own --load; with another --load, what it says of the network is no contradiction.
    stale = {f"{prefix}{field}" for prefix in ("", "teacher_") if f"{prefix}load" in flags for field in NETWORK_FIELDS}
    return Parsed(config, (flags | (set(from_files) - stale)) & frozenset(known_keys(command)))


def read_words(parser: Any, words: Sequence[str]) -> Any:
    """What a parser makes of the words of a command line; its complaints become a ``UserError`` of one sentence."""
    try:
        return parser.parse_args([underscored(word) for word in words])
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(one_sentence(error)) from None


def run_as_flag(arguments: Sequence[str]) -> list[str]:
    """RUN, where it is the first word, as --load RUN."""
    named = bool(arguments) and not arguments[0].startswith("-")
    return ["--load", *arguments] if named else list(arguments)


def _layered(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One map, the later layer winning; milestones by number replace those by share that lie below them, and a rate
    replaces rules for rates.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if "lr_decay_epochs" in layer and "lr_decay_at" not in layer:
            merged.pop("lr_decay_at", None)
        if "lr" in layer and "lr_for" not in layer:
            merged.pop("lr_for", None)
        merged |= layer
    return merged


def _preset(command: str, name: str) -> dict[str, Any]:
    if name not in presets():
        raise one_of("preset", name, presets())
    text = resources.files("metric_kd.presets").joinpath(f"{name}.yaml").read_text()
    return _from_yaml(command, text, f"preset {name}")


def underscored(token: str) -> str:
    """--lr-decay-epochs is --lr_decay_epochs; values are left alone."""
    match = re.match(r"--([A-Za-z][\w-]*)(=.*)?$", token, re.DOTALL)
    return f"--{match[1].replace('-', '_')}{match[2] or ''}" if match else token


def _check_flags(command: str, tokens: Sequence[str]) -> None:
    known = [*known_keys(command), "config", *(["preset"] if command in RECIPES else []), "help"]
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
        content = parse_yaml(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where} is no valid YAML ({str(error).splitlines()[0]}); mend it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold a map of flags to values.")
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    for key in content:
        if key not in known_keys(command):
            raise one_of(f"key in {where}:", key, known_keys(command))
    return content


def _as_flags(command: str, values: dict[str, Any]) -> list[str]:
    """The flags that say what a YAML map says; null stands for the default where there is no value by default."""
    kinds = {field.name: field for field in dataclasses.fields(COMMANDS[command])}
    tokens: list[str] = []
    for key, value in values.items():
        several = "list" in str(kinds[key].type)
        if value is None:
            if type(None) not in get_args(kinds[key].type):
                raise UserError(f"{key} is null; give it a value or leave it out.")
        elif not several:
            if isinstance(value, list | dict):
                raise UserError(f"{key} takes one value, not {value!r}.")
            tokens.append(f"--{key}={_text(value)}")
        elif key in REPEATED:
            entries = value if isinstance(value, list) else [value]
            tokens += [f"--{key}={_loss_text(entry) if key == 'loss' else _text(entry)}" for entry in entries]
        else:
            entries = [_text(entry) for entry in (value if isinstance(value, list) else [value])]
            for entry in entries:
                if re.match(r"-+[A-Za-z_]|--", entry):  # it would be a flag of its own
                    raise UserError(
                        f"{key} holds {entry!r}, which looks like a flag; write the flag as a key of its own."
                    )
            tokens += [f"--{key}", *entries]
    return tokens


def read_text(path: "str | Path") -> str:
    """The text of a YAML file. Raises ``UserError`` where it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read ({reason}); give a YAML file.") from error


REPEATED = ("loss", "plugins", "mutual", "lr_for", "also_eval")
"""Flags that are given once per entry."""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _loss_text(loss: Any) -> str:
    """{name: st, weight: 0.1, temperature: 4} as st:0.1,temperature=4; what the names mean is checked later."""
    if isinstance(loss, str):
        return loss
    if not isinstance(loss, dict) or "name" not in loss:
        raise UserError(f"a loss in YAML is a map with a name, as in {{name: rkd_distance, weight: 1}}; got {loss!r}.")
    weight = f":{loss['weight']}" if loss.get("weight") is not None else ""
    options = [f"{key}={_text(value)}" for key, value in loss.items() if key not in ("name", "weight")]
    return ",".join([f"{loss['name']}{weight}", *options])


def _explicit_booleans(command: str, tokens: Sequence[str]) -> list[str]:
    """--dry_run alone means --dry_run=true."""
    switches = {f"--{field.name}" for field in dataclasses.fields(COMMANDS[command]) if field.type is bool}
    return [
        f"{token}=true" if token in switches and after.startswith("--") else token
        for token, after in zip(tokens, [*tokens[1:], "--"], strict=False)
    ]


def _parser(command: str, program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    kind = COMMANDS[command]
    parser = ArgumentParser(
        prog=program or f"metric-kd {command}", description=kind.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=str, help="YAML file of flags; a run's config.yaml repeats the run")
    if command in RECIPES:
        parser.add_argument("--preset", type=str, help=f"recipe of a paper: {', '.join(presets())}")
    for key in dataclasses.fields(kind):
        default = key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default
        options: dict[str, Any] = {"default": default, "help": key.metadata["help"]}
        if key.name in REPEATED:
            parser.add_argument(f"--{key.name}", type=str, action="append", **options)
        elif key.type in (list[int], list[str], list[float] | None):
            kind_of_entry = int if key.type == list[int] else str if key.type == list[str] else float
            parser.add_argument(f"--{key.name}", type=kind_of_entry, nargs="*", **options)
        else:
            parser.add_argument(f"--{key.name}", type=key.type, **options)
    return parser


def one_sentence(error: Exception) -> str:
    """A parser's complaint in one line, in the words of the flags."""
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
