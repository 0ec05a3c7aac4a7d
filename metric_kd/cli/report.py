"""`metric-kd report RUN [RUN ...]`: what was trained, what it achieves and how sure that is, as one HTML page.

Runs that were tested on the same images are compared, with each other and with their teachers.
"""

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from metric_kd.cli.beside import check_page
from metric_kd.cli.measuring import Measuring
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.cli.reported import Finished, finished, names_of
from metric_kd.devices import check_device, choose_device
from metric_kd.engine.checkpoint import find_checkpoint
from metric_kd.engine.run_directory import check_folder
from metric_kd.errors import UserError
from metric_kd.report.embedding_map import require
from metric_kd.report.run_report import MAPS, write_run_report
from metric_kd.version import __version__

PAGE = "report.html"


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    out = _checked(options)
    load_plugins(options.plugins)
    runs = [finished(path) for path in options.runs]
    titles = _titles(runs)
    measuring = Measuring(titles, options.device)
    tests = measuring.add_all(runs)
    names = [titles[run.file] for run in runs]
    sets = ", ".join(dict.fromkeys(test.name for test in tests))
    page = write_run_report(
        out,
        tests,
        title=f"Report: {names[0]}" if len(names) == 1 else f"Report on {len(names)} runs",
        intro=f"{_listed(names)}, measured on the test images of the data set{'s' if ',' in sets else ''} {sets}.",
        notes=[*_incomparable(tests), *measuring.notes],
        facts=_facts(options.device),
        examples=options.images,
        maps=options.map,
    )
    for note in measuring.notes:
        print(note)
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


def _checked(options: Any) -> Path:
    """Where the page goes; every refusal that needs no run."""
    check_device(options.device)
    require(options.map)
    if options.images < 0:
        raise UserError(f"--images is {options.images}; give 0 or more.")
    out = Path(PAGE if options.out is None else options.out)
    if out.is_dir() or out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out} must be a file that ends in .html.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first.")
    check_folder(out.absolute().parent, "--out")
    if options.out is None:
        check_page(out)
    return out


def _titles(runs: Sequence[Finished]) -> dict[Path, str]:
    """What every run, and every teacher that is there, is called on the page."""
    files = [run.file for run in runs]
    if len(set(files)) < len(files):
        twice = next(run.run.path for run in runs if files.count(run.file) > 1)
        raise UserError(f"{twice} is named twice; name it once.")
    for run in runs:
        path = run.teacher
        if path is not None and not path.endswith(".npy") and Path(path).exists():
            files.append(find_checkpoint(path, "teacher").resolve())
    files = list(dict.fromkeys(files))
    shown = [
        file if file.name == "last.pth" and file.with_name("best.pth") in files else _folder_of(file) for file in files
    ]
    return dict(zip(files, names_of(shown), strict=True))


def _folder_of(file: Path) -> Path:
    """The run's, by which its result is known."""
    return file.parent if file.name in ("best.pth", "last.pth") else file


def _incomparable(tests: Sequence[Any]) -> list[str]:
    if len(tests) < 2:
        return []
    sets = "; ".join(f"{_listed([n.title for n in test.networks])} on {test.name}" for test in tests)
    return [f"Figures on different test images cannot be compared, so there are {len(tests)} parts: {sets}."]


def _facts(device: str) -> dict[str, str]:
    return {
        "Made": f"{datetime.datetime.now():%Y-%m-%d %H:%M} by metric_kd {__version__}",
        "Versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        "Timed on": f"{machine(choose_device(device))}; other work on this machine makes times longer",
    }


def machine(device: torch.device) -> str:
    """The device's name, and of a CPU how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if (cpus := Path("/proc/cpuinfo")).is_file():
        lines = [
            line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")
        ]
        name = lines[0] if lines else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="+", help="run directories")
    parser.add_argument("--out", type=str | None, default=None, help=f"page to write; default {PAGE}")
    parser.add_argument("--images", type=int, default=3, help="queries of each kind in a gallery; 0 for no galleries")
    parser.add_argument(
        "--map",
        type=Literal[tuple(MAPS)],
        default="pca",
        help="map of embeddings; tsne needs scikit-learn, umap needs umap-learn, and both come beside PCA",
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_plugins(parser)
    return parser
