"""Losses on a GPU, forward and backward, against the plain formulas on the same GPU; nothing where there is none.

    python benchmarks/bench_cuda.py [--quick]

Milliseconds between events, medians of interleaved rounds, float32 without TF32; memory is the peak of what PyTorch
allocates beyond the batch. Value and gradient are compared with the formula's before anything is timed.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_angle  # noqa: E402
import bench_pairs  # noqa: E402
from measure import Row, Target, ratio, show  # noqa: E402

Step = Callable[[], tuple[Tensor, Tensor]]
CLOCK = "CUDA events"
TARGETS = {("triton", 512, 512): Target(time=30)}
TOLERANCE = 1e-4
"""Of values and gradients in float32, relative to the largest."""


def steps(name: str, n: int, d: int, device: str = "cuda") -> dict[str, Step]:
    """What is compared, by name: ours (or each kernel of ours) and, where it fits into memory, the formula."""
    if name == "RKD angle":
        data = bench_angle.inputs(n, d, device=device)
        ours = ["triton", "torch"] if find_spec("triton") and device == "cuda" else ["torch"]
        names = [*ours, *(["plain"] if n < 2048 else [])]
        return {whose: partial(bench_angle.step, bench_angle.loss_of(whose), *data) for whose in names}
    x, other = (t.to(device) for t in bench_pairs.inputs(name, n, d))
    ours, plain = bench_pairs.LOSSES[name]
    return {"ours": partial(bench_pairs.step, ours, x, other), "plain": partial(bench_pairs.step, plain, x, other)}


def assert_parity(found: dict[str, Step]) -> None:
    if "plain" not in found:
        return
    expected = found["plain"]()
    for whose, own in found.items():
        for got, right in zip(own(), expected, strict=True):
            assert (got - right).abs().max() <= TOLERANCE * right.abs().max(), whose


def between_events(function: Callable[[], Any], calls: int) -> float:
    """Seconds for each of some calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / calls / 1e3


def peak(function: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, 1)


def at(name: str, n: int, d: int, rounds: int) -> list[Row]:
    functions = steps(name, n, d)
    assert_parity(functions)
    times: dict[str, list[float]] = {whose: [] for whose in functions}
    for turn in range(rounds + 1):
        for whose, function in list(functions.items())[:: 1 if turn % 2 == 0 else -1]:
            taken = between_events(function, calls=10)
            times[whose] += [taken] if turn else []  # the first round compiles and fills caches
    peaks = {whose: peak(function) for whose, function in functions.items()}
    rows = []
    for whose in functions:
        if whose == "plain":
            continue
        own = 1e3 * statistics.median(times[whose])
        target = TARGETS.get((whose, n, d), Target())
        title = name if whose == "ours" else f"{name}, {bench_angle.NAMES[whose]}"
        row = Row(title, f"N={n} D={d}", own, None, None, target=target, clock=CLOCK)
        if "plain" in functions:
            row = row._replace(
                peer=1e3 * statistics.median(times["plain"]),
                ratio=ratio(times, whose, "plain"),
                memory_ratio=peaks["plain"] / peaks[whose],
                against="formula",
            )
        rows.append(row)
        if n >= 2048:
            memory = Row(f"{title}, memory", f"N={n} D={d}", peaks[whose] / 2**20, None, None, unit="MiB", clock=CLOCK)
            rows.append(memory)
    return rows


def rows(quick: bool = False) -> list[Row]:
    """Every comparison; none without a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure", file=sys.stderr)
        return []
    rounds = 2 if quick else 5
    sizes = [("RKD angle", 512, 512), ("RKD angle", 2048, 512)]
    if not quick:
        sizes = [("RKD angle", n, d) for n in (128, 256) for d in (128, 512)] + [("RKD angle", 512, 128), *sizes]
        sizes += [("RKD distance", 1024, 512), ("DarkRank", 1024, 512), (bench_pairs.TRIPLETS, 128, 128)]
    return [row for size in sizes for row in at(*size, rounds)]


if __name__ == "__main__":
    show(rows("--quick" in sys.argv[1:]))
