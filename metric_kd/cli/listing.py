"""`metric-kd list datasets|backbones|samplers|losses|methods`: names, one a line; of methods also what they are."""

from collections.abc import Sequence

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.data import DATASETS
from metric_kd.errors import UserError, one_of
from metric_kd.losses import pml
from metric_kd.losses.samplers import SAMPLERS
from metric_kd.losses.term import TERMS
from metric_kd.models import backbone_names


def names(kind: str) -> list[str]:
    if kind == "datasets":
        return list(DATASETS)
    if kind == "backbones":
        return backbone_names()
    if kind == "samplers":
        return list(SAMPLERS)
    return [name for name in TERMS if TERMS[name].reads_teacher == (kind == "methods")]


def methods() -> list[str]:
    """One line per method: name, family, what it reads, cost, default weight, paper."""
    rows = [("method", "family", "needs", "cost", "weight", "paper")]
    for name in names("methods"):
        term = TERMS[name]
        rows.append((name, term.family, "+".join(term.needs), term.cost, f"{term.default_weight:g}", term.paper))
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]
    return [f"{line}  {row[5]}" for line, row in zip(lines, rows, strict=True)]


NO_PML = "pml.NAME: any loss of pytorch-metric-learning, once it is installed (extra pml)"
KINDS = ("datasets", "backbones", "samplers", "losses", "methods")


def main(arguments: Sequence[str], program: str | None = None) -> int:
    if len(arguments) != 1:
        raise UserError(f"usage: metric-kd list {'|'.join(KINDS)}")
    if arguments[0] not in KINDS:
        raise one_of("list", arguments[0], KINDS)
    if arguments[0] == "losses":
        print("\n".join(names("losses")))
        print("\n".join(f"pml.{name}" if not name.startswith("pml.") else name for name in pml.names()) or NO_PML)
        return 0
    print("\n".join(methods() if arguments[0] == "methods" else names(arguments[0])))
    return 0
