"""Losses as users spell them: name:weight,option=value, or a map."""

import contextlib
import inspect
import math
from typing import Any, NamedTuple

import yaml

from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS
from metric_kd.plain import parse_yaml


class LossSpec(NamedTuple):
    """One summand as the user wrote it: ``name:weight,option=value``."""

    name: str
    weight: float
    options: dict[str, Any]

    def __str__(self) -> str:
        options = "".join(f",{key}={_spelt(value)}" for key, value in self.options.items())
        return f"{self.name}:{_spelt(self.weight)}{options}"


def parse_loss(spec: "str | dict[str, Any]") -> LossSpec:
    """``"st:0.1,temperature=4"`` or ``{"name": "st", "weight": 0.1, "temperature": 4}`` as a :class:`LossSpec`.

    The weight defaults to the term's ``default_weight``. Raises ``UserError`` for an unknown loss or option, each with
    a suggestion, and for a weight that is no finite number.
    """
    if isinstance(spec, str):
        head, *pairs = spec.split(",")
        name, _, weight_text = head.partition(":")
        options: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"--loss {spec!r}: write options as option=value, as in st:0.1,temperature=4.")
            options[key.strip()] = _value(value)
        weight: Any = _value(weight_text) if weight_text else None
    elif isinstance(spec, dict):
        options = dict(spec)
        if "name" not in options:
            raise UserError(
                f"a loss in YAML is a map with a name, as in {{name: rkd_distance, weight: 1}}; got {spec!r}."
            )
        name, weight = str(options.pop("name")), options.pop("weight", None)
        weight = _value(weight) if isinstance(weight, str) else weight
    else:
        raise UserError(f"a loss is written name:weight,option=value; got {spec!r}.")
    name = TERMS.canonical(name.strip())
    weight = TERMS[name].default_weight if weight is None else weight
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise UserError(
            f"the weight of loss {name!r} is {weight!r}; give a finite number, and options after commas, as in "
            f"{name}:1,option=value."
        )
    return LossSpec(name, float(weight), {key: _option(name, key, value) for key, value in options.items()})


def _value(text: str) -> Any:
    """The value that a text spells: null, true, a number (1e-3 too, which YAML 1.1 takes for text), or the text itself."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return text if value is None and text.strip() not in ("null", "~") else value


def _spelt(value: Any) -> str:
    """The inverse of :func:`_value`, without loss."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def option_names(name: str) -> list[str]:
    """The options that a term takes: the keywords of its constructor."""
    parameters = inspect.signature(TERMS[name].__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _option(name: str, key: str, value: Any) -> Any:
    known = option_names(name)
    if key not in known:
        raise (
            one_of(f"option of loss {name!r}:", key, known)
            if known
            else UserError(f"loss {name!r} takes no options; remove {key!r}.")
        )
    default = inspect.signature(TERMS[name].__init__).parameters[key].default
    if value is None:
        if default is not None:
            raise UserError(f"option {key!r} of loss {name!r} needs a value; its default is {default!r}.")
        return None
    if isinstance(default, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise UserError(f"option {key!r} of loss {name!r} is a number; got {value!r}.") from None
    if isinstance(default, str) and not isinstance(value, str):
        return str(value)
    if default is not None and type(value) is not type(default):
        raise UserError(f"option {key!r} of loss {name!r} is of type {type(default).__name__}; got {value!r}.")
    return value
