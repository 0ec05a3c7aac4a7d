"""The angle loss, forward and backward: ours against the plain N x N x D formula, in time and in memory.

    python benchmarks/angle_loss.py [--quick]

One thread, process CPU time, rounds interleaved, medians and medians of per-round ratios. Memory is the kernel's own
high-water mark (VmHWM, reset before the run) minus what was resident before, each measurement in a fresh process; Linux
only. Float64 parity of value and gradient is asserted first. Exits with status 1 where a target is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from metric_kd.functional import rkd_angle  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
MIN_SPEEDUP, MIN_SAVING, MAX_LARGE_MIB = 16.0, 50.0, 128.0
LARGE = (1024, 128)


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula as it is written: all unit differences (N, N, D), all cosines (N, N, N)."""

    def cosines(x: Tensor) -> Tensor:
        units = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        return torch.bmm(units, units.transpose(1, 2)).flatten()

    with torch.no_grad():
        target = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), target)


LOSSES: dict[str, Loss] = {"ours": rkd_angle, "plain": plain}


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(2))
    return student, teacher


def step(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of one forward and backward."""
    x = student.detach().requires_grad_()
    value = loss(x, teacher)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def assert_parity() -> None:
    for n, d in ((3, 2), (17, 8), (48, 33)):
        (value, gradient), (expected, expected_gradient) = (
            step(loss, *inputs(n, d, torch.float64)) for loss in LOSSES.values()
        )
        assert abs(value - expected) <= 1e-12 * expected, (n, d)
        assert (gradient - expected_gradient).abs().max() <= 1e-12 * expected_gradient.abs().max(), (n, d)
    print("float64 parity of value and gradient: within 1e-12")


def times(n: int, d: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time per loss and round; the order turns round every time."""
    student, teacher = inputs(n, d)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for turn in range(rounds + 1):
        for name in list(LOSSES)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            step(LOSSES[name], student, teacher)
            if turn:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure_memory(name: str, n: int, d: int) -> None:
    """Run in a fresh process: print the peak of one step in MiB."""
    step(LOSSES[name], *inputs(8, 4))
    student, teacher = inputs(n, d)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    step(LOSSES[name], student, teacher)
    print(status_mib("VmHWM") - before)


def memory(name: str, n: int, d: int) -> float:
    command = [sys.executable, __file__, "--child", name, str(n), str(d)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, and only the sizes that have a target")
    parser.add_argument("--child", nargs=3, metavar=("LOSS", "N", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        measure_memory(options.child[0], int(options.child[1]), int(options.child[2]))
        return 0

    assert_parity()
    rounds = 2 if options.quick else 5
    sizes = [(256, 512)] if options.quick else [(64, 128), (128, 128), (256, 128), (256, 512)]
    print(f"torch {torch.__version__}, 1 thread, CPU time, median of {rounds} rounds, forward and backward, float32")
    print(f"allocator: GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '(default)')}\n")
    row = "{:>5} {:>5} {:>10} {:>9} {:>8} {:>11} {:>10} {:>8}".format
    print(row("N", "D", "plain ms", "ours ms", "faster", "plain MiB", "ours MiB", "less"))
    for n, d in sizes:
        seconds = times(n, d, rounds)
        ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
        ours, theirs = (1e3 * statistics.median(seconds[name]) for name in ("ours", "plain"))
        mib = {name: memory(name, n, d) for name in LOSSES}
        saving = mib["plain"] / max(mib["ours"], 1e-3)
        values = f"{theirs:.1f}", f"{ours:.1f}", f"{ratio:.1f}x", f"{mib['plain']:.1f}", f"{mib['ours']:.2f}"
        print(row(n, d, *values, f"{saving:.1f}x"))
    large = memory("ours", *LARGE)
    print(row(*LARGE, "-", "-", "-", "-", f"{large:.2f}", "-"), "\n")
    met = [ratio >= MIN_SPEEDUP, saving >= MIN_SAVING, large <= MAX_LARGE_MIB]
    print(f"N=256 D=512: at least {MIN_SPEEDUP:g} times faster: {verdict(met[0])}")
    print(f"N=256 D=512: at least {MIN_SAVING:g} times less peak memory: {verdict(met[1])}")
    print(f"N={LARGE[0]} D={LARGE[1]}: at most {MAX_LARGE_MIB:g} MiB: {verdict(met[2])}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
