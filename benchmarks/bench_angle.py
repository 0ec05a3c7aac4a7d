"""The angle loss, forward and backward: ours, by each kernel that is installed, against the plain N x N x D formula.

    python benchmarks/bench_angle.py [--quick]

One thread, process CPU time, rounds interleaved, float32. Memory is the kernel's own high-water mark in a fresh process;
Linux only. Float64 parity of value and gradient is asserted first. bench_cuda.py does the same on a GPU.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import Row, Target, compared, interleaved, peak_in_a_process, show  # noqa: E402

from metric_kd.functional import rkd_angle  # noqa: E402
from metric_kd.kernels import VARIABLE  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
LARGE = (1024, 128)
LARGE_MIB = 128.0
TARGETS = {
    ("torch", 256, 512): Target(time=18, tuned=15, memory=50),
    ("torch", 128, 128): Target(time=7, memory=12),
    ("numba", 256, 512): Target(time=100),
}
FORMULA = "N x N x D formula"
NAMES = {"torch": "torch alone", "numba": "numba kernel", "triton": "Triton kernel"}


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """The formula as it is written: all unit differences (N, N, D), all cosines (N, N, N)."""

    def cosines(x: Tensor) -> Tensor:
        units = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        return torch.bmm(units, units.transpose(1, 2)).flatten()

    with torch.no_grad():
        target = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), target)


def by(kernel: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Ours with one kernel, whatever is chosen outside."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = kernel
    try:
        return rkd_angle(student, teacher)
    finally:
        os.environ.pop(VARIABLE)
        os.environ |= {} if before is None else {VARIABLE: before}


def kernels() -> list[str]:
    """Those that run on this CPU."""
    return ["torch", *(name for name in ("numba",) if find_spec(name))]


def loss_of(name: str) -> Loss:
    return plain if name == "plain" else partial(by, name)


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, d, generator=generator, dtype=dtype).to(device) for _ in range(2))
    return student, teacher


def step(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of one forward and backward."""
    x = student.detach().requires_grad_()
    value = loss(x, teacher)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def assert_parity() -> None:
    for n, d in ((3, 2), (17, 8), (48, 33), (130, 16)):
        value, gradient = step(plain, *inputs(n, d, torch.float64))
        for kernel in kernels():
            own, own_gradient = step(loss_of(kernel), *inputs(n, d, torch.float64))
            assert abs(own - value) <= 1e-12 * value, (kernel, n, d)
            assert (own_gradient - gradient).abs().max() <= 1e-12 * gradient.abs().max(), (kernel, n, d)


def prepared(name: str, n: int, d: int) -> Callable[[], Any]:
    """One step, warmed up on a small batch, for the memory it takes."""
    loss = loss_of(name)
    step(loss, *inputs(8, 4))
    student, teacher = inputs(n, d)
    return lambda: step(loss, student, teacher)


def at(n: int, d: int, rounds: int) -> list[Row]:
    student, teacher = inputs(n, d)
    names = [*kernels(), "plain"]
    found = interleaved({name: partial(step, loss_of(name), student, teacher) for name in names}, rounds)
    peaks = {name: peak_in_a_process("bench_angle", "prepared", name, n, d) for name in names}
    return [
        compared(
            f"RKD angle, {NAMES[name]}",
            f"N={n} D={d}",
            found,
            name,
            "plain",
            TARGETS.get((name, n, d), Target()),
            memory_ratio=peaks["plain"] / peaks[name],
            against=FORMULA,
        )
        for name in names[:-1]
    ]


def large() -> list[Row]:
    """Memory where the formula has no place: 4.3 GB for each of its tensors of cosines."""
    n, d = LARGE
    target = Target(most=LARGE_MIB)
    return [
        Row(
            f"RKD angle, {NAMES[name]}, memory",
            f"N={n} D={d}",
            peak_in_a_process("bench_angle", "prepared", name, n, d) / 2**20,
            None,
            None,
            target=target,
            unit="MiB",
        )
        for name in kernels()
    ]


def rows(quick: bool = False) -> list[Row]:
    """Every comparison, after parity is asserted."""
    assert_parity()
    rounds = 2 if quick else 5
    sizes = [(128, 128), (256, 512)] if quick else [(64, 128), (128, 128), (256, 128), (256, 512)]
    return [row for size in sizes for row in at(*size, rounds)] + large()


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '(default)')}")
    show(rows("--quick" in sys.argv[1:]))


if __name__ == "__main__":
    main()
