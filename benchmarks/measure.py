"""Measuring one thing against another in one process: processor time in alternation, and the memory that a call takes."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metric_kd.engine.memory import peak_memory, reset_peak_memory


class Row(NamedTuple):
    """One comparison. ours, peer: in ``unit`` (None where the peer cannot run); ratio: how many times ahead, by time;
    memory_ratio: by memory; target: what the ratio should be at least, in words that say which of both."""

    name: str
    size: str
    ours: float
    peer: float | None
    ratio: float | None
    memory_ratio: float | None = None
    target: str = ""
    unit: str = "ms"


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 5, least: float = 0.05
) -> dict[str, list[float]]:
    """name -> processor seconds per call, one figure for each round; rounds go back and forth (A B C, C B A).

    A function is called until ``least`` seconds are spent in a round, after one call that is not timed.
    """
    repeats = {}
    for name, function in functions.items():
        function()
        started = time.process_time()
        function()
        repeats[name] = max(1, round(least / max(time.process_time() - started, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            started = time.process_time()
            for _ in range(repeats[name]):
                functions[name]()
            found[name].append((time.process_time() - started) / repeats[name])
    return found


def ratio(found: Mapping[str, list[float]], ours: str, peer: str) -> float:
    """The median over rounds of how many times as long the peer takes."""
    return statistics.median(theirs / own for own, theirs in zip(found[ours], found[peer], strict=True))


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call takes at most beyond what was there before; in a process that has done little else."""
    before = reset_peak_memory()
    assert before is not None, "memory is measured on Linux only"
    function()
    return max(peak_memory() - before, 0)


def peak_in_a_process(module: str, function: str, *arguments: Any) -> int:
    """:func:`peak` of ``module.function(*arguments)()``, a function that prepares and returns what is measured, in a
    process of its own with one thread. ``module``: of this folder; arguments: plain values."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "import ast, importlib, measure\n"
        "prepared = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*ast.literal_eval(sys.argv[4]))\n"
        "print(measure.peak(prepared))\n"
    )
    here = str(Path(__file__).resolve().parent)
    words = [sys.executable, "-c", code, here, module, function, repr(arguments)]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
