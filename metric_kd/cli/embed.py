"""`metric-kd embed RUN --images DIR --out FILE.npy`: the embeddings of a folder of images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from metric_kd.cli.beside import check_table
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.data.decode import check_header
from metric_kd.deploy.embedder import images_in, load
from metric_kd.deploy.names import check_utf8, shown
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import write_atomically, write_text
from metric_kd.engine.run_directory import check_folder
from metric_kd.errors import UserError


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    load_plugins(options.plugins)
    out = Path(options.out)
    if out.suffix != ".npy" or out.is_dir():
        raise UserError(f"--out {out} must be a file that ends in .npy.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first.")
    check_folder(out.absolute().parent, "--out")
    check_table(out)
    if options.batch < 1:
        raise UserError(f"--batch is {options.batch}; give 1 or more.")
    paths = images_in(options.images)
    names = [str(Path(path).relative_to(options.images)) for path in paths]
    check_utf8(names)
    embedder = load(options.run, str(choose_device(options.device)), options.precision, options.bridge)
    skipped: list[str] | None = [] if options.skip_unreadable else None
    if skipped is None:
        for path in paths:
            check_header(path)
    vectors = embedder.embed(paths, options.batch, progress=True, skipped=skipped)
    lost = set(skipped or ())
    kept = [name for name, path in zip(names, paths, strict=True) if path not in lost]
    if not kept:
        raise UserError(f"none of the images in {options.images} can be read; check --images.")
    if not np.isfinite(vectors).all():
        first = shown(kept[int(np.isfinite(vectors).all(1).argmin())])
        raise UserError(
            f"the embedding of {first} is not finite, so nothing was written; use --precision fp32 or another model."
        )
    _write(out, vectors, kept)
    if skipped:
        print(f"skipped {len(skipped)} unreadable images, the first {shown(skipped[0])}")
    print(
        f"wrote {shown(out)}: {len(kept)} embeddings of length {vectors.shape[1]}; their files are in "
        f"{shown(out.with_suffix('.csv'))}"
    )
    return 0


def _write(out: Path, vectors: np.ndarray, names: list[str]) -> None:
    """The vectors and the table of their names; a kill never leaves vectors beside the names of others."""
    table, text = out.with_suffix(".csv"), io.StringIO()
    csv.writer(text).writerows([["path"], *([name] for name in names)])

    def write(file: BinaryIO) -> None:
        np.save(file, vectors)
        if not table.is_file() or table.read_bytes() != text.getvalue().encode():
            out.unlink(missing_ok=True)
            write_text(table, text.getvalue())

    write_atomically(out, write)


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", type=str, help="run directory or checkpoint")
    parser.add_argument("--images", type=str, required=True, help="folder of images, searched through")
    parser.add_argument("--out", type=str, required=True, help="FILE.npy to write; the names go to FILE.csv beside it")
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    parser.add_argument("--precision", type=Literal["fp32", "bf16", "fp16"], default="fp32", help="precision")
    parser.add_argument("--bridge", action="store_true", help="in the teacher's space, by the student's stored bridge")
    parser.add_argument("--skip_unreadable", action="store_true", help="count and skip images that cannot be read")
    add_plugins(parser)
    return parser
