"""Objective: a weighted sum of terms, and the one spelling in which a user writes it."""

import contextlib
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from metric_kd.distances import sharing
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


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
        raise UserError(f"the weight of loss {name!r} is {weight!r}; give a finite number, as in {name}:1.")
    return LossSpec(name, float(weight), {key: _option(name, key, value) for key, value in options.items()})


def _value(text: str) -> Any:
    """The value that a text spells: null, true, a number (1e-3 too, which YAML 1.1 takes for text), or the text itself."""
    try:
        value = yaml.safe_load(text)
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


class Objective(nn.Module):
    """sum_i weight_i * term_i(student, teacher, batch); terms of weight zero are not built and cost nothing.

    One :class:`~metric_kd.distances.Pairwise` per tensor is shared by all terms of a step. Raises ``UserError`` where
    no term is left.
    """

    def __init__(self, losses: Sequence[LossSpec]):
        super().__init__()
        active = [loss for loss in losses if loss.weight != 0]
        if not active:
            raise UserError("every loss has weight zero; give at least one, as in --loss rkd_distance:1.")
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for loss in active:
            key = loss.name
            while key in self.terms:  # the same term twice, with other options
                key += "_"
            self.terms[key] = TERMS[loss.name](**loss.options)
            self.weights[key] = loss.weight

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    @property
    def student_needs(self) -> tuple[str, ...]:
        """Fields of ``Output`` that some term reads from the student."""
        return tuple(sorted({need for term in self._terms() for need in term.needs}))

    @property
    def teacher_needs(self) -> tuple[str, ...]:
        """Fields that some term reads from the teacher; empty where no term has a teacher."""
        return tuple(sorted({need for term in self._terms() if term.reads_teacher for need in term.needs}))

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        """Let every term create its trained parts from the outputs for two example images."""
        for term in self._terms():
            term.build(student, teacher if term.reads_teacher else None, num_classes)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, {term: unweighted value, detached}); both stay on the device."""
        values: dict[str, Tensor] = {}
        with sharing():
            for name, term in self.terms.items():
                value = term(student, teacher if term.reads_teacher else None, batch)
                if not isinstance(value, Tensor) or value.ndim:
                    raise UserError(
                        f"loss {name!r} must return a scalar tensor; average over the batch in its forward."
                    )
                values[name] = value
        total = torch.stack([self.weights[name] * value for name, value in values.items()]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def _terms(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term)]


def require_provided(owner: str, provides: frozenset[str], needs: Sequence[str], losses: Sequence[LossSpec]) -> None:
    """Refuse, in one sentence, a network that cannot give what the terms read."""
    for need in needs:
        if need not in provides:
            askers = [loss.name for loss in losses if loss.weight != 0 and need in TERMS[loss.name].needs]
            raise UserError(
                f"loss {askers[0] if askers else '?'!r} reads {need}, which the {owner} does not give "
                f"(it gives {', '.join(sorted(provides))}); choose another loss or another {owner}."
            )
