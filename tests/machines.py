"""Run the suite as on machines of other instruction sets and numbers of threads: `make test-machines`."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
THREADS = (1, 2)
WITHOUT = "NPY_DISABLE_CPU_FEATURES"


class Level(NamedTuple):
    """An instruction set: what each library that chooses its kernels by the processor is told, and what it does without.

    without: how the groups of instructions begin that NumPy must leave alone.
    """

    variables: dict[str, str]
    without: tuple[str, ...]


LEVELS = {
    "default": Level(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "OPENBLAS_CORETYPE": "Nehalem",
            "NUMBA_CPU_NAME": "generic",
            "NUMBA_CPU_FEATURES": "",
            "FAISS_SIMD_LEVEL": "NONE",
        },
        ("AVX", "X86_V", "FMA", "F16C"),
    ),
    "avx2": Level(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell",
            "NUMBA_CPU_NAME": "haswell",
            "NUMBA_CPU_FEATURES": "",
            "FAISS_SIMD_LEVEL": "AVX2",
        },
        ("AVX512", "X86_V4"),
    ),
    "avx512": Level({"ATEN_CPU_CAPABILITY": "avx512"}, ()),
}
"""From the oldest to the newest; the newest only has PyTorch told, since a processor that has it is what others ask."""


def processor() -> str:
    """The newest of ``LEVELS`` that PyTorch uses here, left alone."""
    os.environ.pop("ATEN_CPU_CAPABILITY", None)
    import torch

    found = torch.backends.cpu.get_cpu_capability().lower()
    return next((name for name in reversed(LEVELS) if found.startswith(name)), "default")


def variables(level: Level, threads: int) -> dict[str, str]:
    """The environment of the suite."""
    from numpy._core import _multiarray_umath as numpy_core

    off = os.environ.get(WITHOUT, "").split()  # where the suite runs in a suite
    groups = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name) or name in off]
    ours = {"METRIC_KD_TEST_THREADS": str(threads), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    if left_out := [name for name in groups if name.startswith(level.without)]:
        ours[WITHOUT] = " ".join(left_out)
    others = {WITHOUT, *(key for each in LEVELS.values() for key in each.variables)}
    return {key: value for key, value in os.environ.items() if key not in others} | level.variables | ours


def suite(level: Level, threads: int, arguments: list[str]) -> tuple[bool, str]:
    """Whether all tests passed, and the columns of the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--no-loadscope-reorder",
            f"--junitxml={report}",
            *arguments,
        ]
        done = subprocess.run(command, cwd=ROOT, env=variables(level, threads))
        if not report.is_file():
            return False, f"    pytest ended with {done.returncode}"
        found = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed, skipped = int(found["failures"]) + int(found["errors"]), int(found["skipped"])
    passed = int(found["tests"]) - failed - skipped
    return done.returncode == 0, f"{passed:>8}{failed:>8}{skipped:>9}{float(found['time']):>9.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=f"{__doc__} Other arguments go to pytest.", allow_abbrev=False)
    parser.add_argument("--only", choices=LEVELS, help="this instruction set alone")
    parser.add_argument("--threads", type=int, choices=THREADS, help="this number of threads alone")
    options, arguments = parser.parse_known_args()
    has = list(LEVELS).index(processor())
    lines, well = [f"{'':10}{'threads':>8}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"], True
    for place, (name, level) in enumerate(LEVELS.items()):
        if options.only not in (None, name):
            continue
        if place > has:
            lines.append(f"{name:10}not run: this processor has not these instructions")
            continue
        for threads in THREADS if options.threads is None else (options.threads,):
            print(f"\n== {name}, threads: {threads}", flush=True)
            passed, columns = suite(level, threads, arguments)
            well &= passed
            lines.append(f"{name:10}{threads:>8}{columns}")
    print("", *lines, sep="\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
