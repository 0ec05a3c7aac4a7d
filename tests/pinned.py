"""Numbers pinned from reference implementations: tests/golden/rkd.json names the cases, rkd.npz holds their arrays."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent / "golden"


class Case(NamedTuple):
    """Arguments by their names in the reference (float64 or int64 tensors), options, and what came out."""

    hyper: dict[str, Any]
    inputs: dict[str, Tensor]
    aux: dict[str, Tensor]
    outputs: dict[str, Any]


@cache
def _load(family: str) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    cases = json.loads((GOLDEN / f"{family}.json").read_text())["cases"]
    with np.load(GOLDEN / f"{family}.npz") as arrays:
        return {case["name"]: case for case in cases}, dict(arrays)


def names(prefix: str = "", family: str = "rkd") -> list[str]:
    return [name for name in _load(family)[0] if name.startswith(prefix)]


def case(name: str, family: str = "rkd") -> Case:
    cases, arrays = _load(family)
    found = cases[name]

    def tensors(part: str) -> dict[str, Any]:
        return {
            key: torch.from_numpy(np.array(arrays[value])) if isinstance(value, str) else value
            for key, value in found[part].items()
        }

    return Case(found["hyper"], tensors("inputs"), tensors("aux"), tensors("outputs"))


def assert_close(ours: Tensor, pinned: Tensor, rtol: float = 1e-9) -> None:
    """Relative to the largest pinned entry, so that entries near zero do not decide."""
    scale = pinned.abs().max().clamp(min=1e-300)
    worst = ((ours.detach() - pinned).abs().max() / scale).item()
    assert worst <= rtol, f"differs by {worst:.2e} of the largest entry, more than {rtol:g}"


def arrays(group: str) -> dict[str, Tensor]:
    """The arrays of one group of seeds.npz by name; seeds.json says in words what each group holds."""
    with np.load(GOLDEN / "seeds.npz") as stored:
        return {
            key.partition("/")[2]: torch.from_numpy(np.array(stored[key]))
            for key in stored
            if key.startswith(f"{group}/")
        }
