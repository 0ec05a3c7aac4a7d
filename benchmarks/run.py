"""Run the benchmarks of speed and memory, keep what they found, and write the README's table.

    python benchmarks/run.py [--only NAME ...] [--quick] [--allocator default|tuned|both] [--photos DIR]
                             [--results FILE] [--readme FILE]

Every file bench_NAME.py runs in a process of its own, on one thread unless a row says otherwise: once as the system is
and once with a C allocator that keeps large blocks ("tuned"), for much of what a plain formula costs is page faults of
its temporaries. Rows that are measured replace the same rows of earlier runs in results.json; all others stay. --quick
takes fewer rounds and smaller sizes to see that all work, and writes only to files that are named. Nothing else should
run on the machine; without --quick it takes long, most of it for recall and epoch.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import torch  # noqa: E402
from table import ALLOCATORS, Entry, check_marks, restored, tables, written  # noqa: E402

from metric_kd.engine.checkpoint import write_text  # noqa: E402
from metric_kd.errors import UserError, one_of  # noqa: E402

MODULES = ("angle", "pairs", "data", "recall", "step", "epoch", "cuda")
PHOTOS = "METRIC_KD_PHOTOS"
TUNED = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
FORMAT = 1
CHILD = (
    "import sys; sys.path[:0] = sys.argv[1:3]\n"
    "import torch; torch.set_num_threads(1)\n"
    "import importlib, json, table\n"
    "rows = importlib.import_module('bench_' + sys.argv[3]).rows(sys.argv[4] == 'quick')\n"
    "open(sys.argv[5], 'w').write(json.dumps([table.plain(row) for row in rows]))\n"
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be before anything is measured."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(MODULES)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes")
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    parser.add_argument("--photos", type=Path, help=f"folder of class folders of photographs (or {PHOTOS})")
    parser.add_argument("--results", type=Path, help="default benchmarks/results.json, with --quick none")
    parser.add_argument("--readme", type=Path, help="default README.md, with --quick none")
    options = parser.parse_args(words)
    for name in options.only or ():
        if name not in MODULES:
            raise one_of("benchmark", name, list(MODULES))
    if options.photos is not None and not options.photos.is_dir():
        raise UserError(f"--photos {options.photos} is no folder; give one that holds class folders of photographs.")
    if not options.quick:
        options.results = options.results or HERE / "results.json"
        options.readme = options.readme or ROOT / "README.md"
    if options.readme is not None:
        if not options.readme.is_file():
            raise UserError(f"--readme {options.readme} does not exist; give a text file with a place for the table.")
        check_marks(options.readme.read_text(), options.readme)
    return options


def machine(quick: bool) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "revision": _revision(),
        "quick": quick,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    special = [name for flag, name in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in found.get("flags", "")]
    name = found.get("model name", platform.machine())
    return f"{name} with {' and '.join(special)}" if special else name


def _revision() -> str | None:
    """The short hash of the checkout, with a plus where it has changes; None outside one."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measured(module: str, allocator: str, quick: bool, photos: Path | None) -> list[dict[str, Any]] | None:
    """The rows of one file under one allocator, from a process of its own; None where that failed."""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment["OMP_NUM_THREADS"] = "1"
    if allocator == "tuned":
        environment["GLIBC_TUNABLES"] = TUNED
    if photos is not None:
        environment[PHOTOS] = str(photos.resolve())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, "-c", CHILD, str(HERE), str(ROOT), module, "quick" if quick else "full", str(out)]
        if subprocess.run(words, env=environment, stdout=2).returncode:  # what it says is no part of the table
            return None
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def read(file: Path | None) -> list[Entry]:
    """What earlier runs have found."""
    if file is None or not file.exists():
        return []
    try:
        content = json.loads(file.read_text())
        if content["format"] == FORMAT:
            return [{**entry, "rows": [restored(row) and row for row in entry["rows"]]} for entry in content["entries"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} holds no results of this program; remove it, or give another --results.")


def merged(entries: Sequence[Entry], new: Entry) -> list[Entry]:
    """The entries with ``new``, and without the rows that it has measured again."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["name"], row["size"], row["against"]

    again = {key(row) for row in new["rows"]}
    kept = []
    for entry in entries:
        same = (entry["module"], entry["allocator"]) == (new["module"], new["allocator"])
        rows = [row for row in entry["rows"] if not (same and key(row) in again)]
        kept += [{**entry, "rows": rows}] if rows else []
    order = [*kept, new] if new["rows"] else kept
    return sorted(order, key=lambda entry: (MODULES.index(entry["module"]), ALLOCATORS.index(entry["allocator"])))


def write(entries: Sequence[Entry], results: Path | None, readme: Path | None) -> None:
    """results.json and the README's table."""
    if results is not None:
        write_text(results, json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n")
    if readme is not None and entries:
        write_text(readme, written(readme.read_text(), tables(entries), readme))


def benchmark(options: argparse.Namespace) -> list[str]:
    """Run what was asked for, print the table of it, and return the names of those that failed."""
    entries, here, failed = read(options.results), machine(options.quick), []
    fresh: list[Entry] = []
    for module in options.only or MODULES:
        if module == "cuda" and not torch.cuda.is_available():
            print("cuda: no CUDA device, nothing to measure", file=sys.stderr)
            continue
        wanted = ALLOCATORS if options.allocator == "both" else [options.allocator]
        for allocator in wanted[:1] if module == "cuda" else wanted:  # a GPU's memory is not the C library's
            print(f"{module}, {allocator} allocator ...", file=sys.stderr, flush=True)
            rows = measured(module, allocator, options.quick, options.photos)
            if rows is None:
                failed.append(f"{module} ({allocator})")
                continue
            new = {"module": module, "allocator": allocator, "machine": here, "rows": rows}
            entries, fresh = merged(entries, new), merged(fresh, new)
            write(entries, options.results, options.readme)
    if fresh:
        print(tables(fresh))
    return failed


def main(words: Sequence[str] | None = None) -> int:
    try:
        failed = benchmark(options_of(words))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if failed:
        print(f"{', '.join(failed)} failed; what was wrong is said above.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
