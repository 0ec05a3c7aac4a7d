"""Measuring one thing against another in one process: time in alternation, the memory that a call takes, and the row of
figures that comes of it."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metric_kd.engine.memory import peak_memory, reset_peak_memory

Clock = Callable[[], float]
CPU = "1 thread, CPU time"
WALL = "2 threads, wall time"


class Target(NamedTuple):
    """What should be reached. time: times as fast as the reference, at least, and ``tuned`` the same with the tuned
    allocator where that is another number; memory: times less memory, at least; most: the figure itself, in the row's
    unit, at most."""

    time: float | None = None
    tuned: float | None = None
    memory: float | None = None
    most: float | None = None


class Row(NamedTuple):
    """One comparison. ours, peer: medians in ``unit`` (None where the peer cannot run, or there is none); ratio: the
    median over rounds of how many times as fast; memory_ratio: how many times less memory; against: what the peer is;
    clock: threads, and which time is taken."""

    name: str
    size: str
    ours: float
    peer: float | None
    ratio: float | None
    memory_ratio: float | None = None
    target: Target = Target()
    unit: str = "ms"
    against: str = ""
    clock: str = CPU


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 5, least: float = 0.05, clock: Clock = time.process_time
) -> dict[str, list[float]]:
    """name -> seconds per call by ``clock``, one figure for each round; rounds go back and forth (A B C, C B A).

    A function is called until ``least`` seconds are spent in a round, after one call that is not timed, or two where
    the first was short.
    """
    repeats = {}
    for name, function in functions.items():
        taken = _seconds(function, clock)
        if taken < 10 * least:  # it may have been the first call that was slow
            taken = _seconds(function, clock)
        repeats[name] = max(1, round(least / max(taken, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            started = clock()
            for _ in range(repeats[name]):
                functions[name]()
            found[name].append((clock() - started) / repeats[name])
    return found


def _seconds(function: Callable[[], Any], clock: Clock) -> float:
    started = clock()
    function()
    return clock() - started


def ratio(found: Mapping[str, list[float]], ours: str, peer: str) -> float:
    """The median over rounds of how many times as long the peer takes."""
    return statistics.median(theirs / own for own, theirs in zip(found[ours], found[peer], strict=True))


def compared(
    name: str, size: str, found: Mapping[str, list[float]], ours: str, peer: str, target: Target, **more: Any
) -> Row:
    """The row of two of the functions that were :func:`interleaved`, in milliseconds; ``more``: other fields of it."""
    own, theirs = (1e3 * statistics.median(found[key]) for key in (ours, peer))
    return Row(name, size, own, theirs, ratio(found, ours, peer), target=target, **{"against": peer, **more})


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call takes at most beyond what was there before; in a process that has done little else."""
    before = reset_peak_memory()
    assert before is not None, "memory is measured on Linux only"
    function()
    return max(peak_memory() - before, 0)


def peak_in_a_process(module: str, function: str, *arguments: Any, times: int = 3) -> int:
    """:func:`peak` of ``module.function(*arguments)()``, a function that prepares and returns what is measured, in a
    process of its own with one thread; the median of ``times`` such, and a page at least. ``module``: of this folder;
    arguments: plain values."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch; torch.set_num_threads(1)\n"
        "import ast, importlib, measure\n"
        "prepared = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*ast.literal_eval(sys.argv[4]))\n"
        "print(measure.peak(prepared))\n"
    )
    here = str(Path(__file__).resolve().parent)
    words = [sys.executable, "-c", code, here, module, function, repr(arguments)]
    said = [subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(times)]
    return max(int(statistics.median(int(text.split()[-1]) for text in said)), 4096)


def show(rows: list[Row]) -> None:
    """Print rows, one a line, for who runs one file of this folder alone."""
    for row in rows:
        figures = [f"{row.ours:.4g} {row.unit}"]
        figures += [] if row.peer is None else [f"{row.against} {row.peer:.4g}"]
        figures += [] if row.ratio is None else [f"{row.ratio:.2f} times as fast"]
        figures += [] if row.memory_ratio is None else [f"{row.memory_ratio:.1f} times less memory"]
        wanted = {key: value for key, value in row.target._asdict().items() if value is not None}
        print(f"{row.name} ({row.size}): {', '.join(figures)}; {row.clock}" + (f"; target {wanted}" if wanted else ""))
