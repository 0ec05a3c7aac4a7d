"""`metric-kd index RUN --images DIR --out FILE`: a folder of images as one file that `metric-kd search` looks in."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.deploy.embedder import images_in
from metric_kd.deploy.factory import EXAMPLES, parse_factory
from metric_kd.deploy.indexing import Made, check_file, make_index
from metric_kd.deploy.measuring import measure
from metric_kd.deploy.model import open_model
from metric_kd.deploy.names import shown
from metric_kd.devices import choose_device
from metric_kd.errors import UserError


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    load_plugins(options.plugins)
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; give 1 or more.")
    if options.factory != "auto":
        parse_factory(options.factory)
    check_file(Path(options.out))
    images_in(options.images)  # before the model is loaded
    started = time.perf_counter()
    model = open_model(options.run, str(choose_device(options.device)), options.precision)
    made = make_index(
        model,
        options.images,
        options.out,
        factory=options.factory,
        keep_vectors=options.keep_vectors,
        batch=options.batch,
        precision=options.precision,
        skip_unreadable=options.skip_unreadable,
        progress=True,
    )
    print(_summary(made, Path(options.out), time.perf_counter() - started))
    return 0


def _summary(made: Made, file: Path, seconds: float) -> str:
    index = made.content.index
    lines, name = [], shown(file)
    if made.skipped:
        lines.append(f"skipped {len(made.skipped)} unreadable images, the first {shown(made.skipped[0])}")
    if made.unchanged:
        lines.append(f"{name} is up to date: {len(index):,} images, {index.factory}")
        return "\n".join(lines)
    lines += made.notes
    lines.append(
        f"{name}: {len(index):,} images, {index.factory}, {file.stat().st_size / 1e6:,.2f} MB, {seconds:.1f} s; "
        f"{made.added:,} added, {made.changed:,} changed, {made.removed:,} removed"
    )
    lines.append(measure(index, vectors=made.vectors).sentence(str(index.factory)))
    lines.append(f"search it with metric-kd search {name} --query IMAGE")
    return "\n".join(lines)


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", type=str, help="run directory, checkpoint, or exported .onnx file")
    parser.add_argument("--images", type=str, required=True, help="folder of images, searched through")
    parser.add_argument(
        "--out", type=str, required=True, help="file to write; one of this folder and model is brought up to date"
    )
    parser.add_argument(
        "--factory", type=str, default="auto", help=f"how vectors are held: {', '.join(EXAMPLES)} (by their number)"
    )
    parser.add_argument(
        "--keep_vectors",
        type=Literal["float16", "float32"] | None,
        default=None,
        help="keep vectors beside the codes of PQ, by which what is found is ordered exactly",
    )
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--precision", type=Literal["fp32", "bf16", "fp16"], default="fp32", help="precision")
    parser.add_argument("--skip_unreadable", action="store_true", help="count and skip images that cannot be read")
    add_plugins(parser)
    return parser
