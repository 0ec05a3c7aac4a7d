"""`metric-kd embed RUN --images DIR --out FILE.npy`: the embeddings of a folder of images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from metric_kd.cli.parse import underscored
from metric_kd.data.decode import decode
from metric_kd.deploy.embedder import images_in, load
from metric_kd.engine.checkpoint import write_atomically, write_text
from metric_kd.errors import UserError


def main(arguments: Sequence[str], program: str | None = None) -> int:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=str, help="run directory or checkpoint")
    parser.add_argument("--images", type=str, required=True, help="folder of images, searched through")
    parser.add_argument(
        "--out", type=str, required=True, help="FILE.npy to write; the file names go to FILE.csv beside it"
    )
    parser.add_argument("--batch", type=int, default=64, help="images per forward pass")
    parser.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to compute")
    parser.add_argument("--precision", type=str, default="fp32", choices=["fp32", "bf16", "fp16"], help="precision")
    parser.add_argument("--skip_unreadable", type=bool, default=False, help="count and skip images that cannot be read")
    options = parser.parse_args([underscored(token) for token in arguments])
    out = Path(options.out)
    if out.suffix != ".npy":
        raise UserError(f"--out {out} must end in .npy.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto.")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    embedder = load(options.run, "cuda" if cuda else "cpu", options.precision)
    paths = list(images_in(options.images))
    if options.skip_unreadable:
        readable = [path for path in paths if _readable(path)]
        print(f"skipped {len(paths) - len(readable)} unreadable images")
        paths = readable
    vectors = embedder.embed(paths, options.batch, progress=True)
    names = io.StringIO()
    csv.writer(names).writerows([["path"], *([str(Path(p).relative_to(options.images))] for p in paths)])
    write_text(out.with_suffix(".csv"), names.getvalue())
    write_atomically(out, lambda file: np.save(file, vectors))
    print(
        f"wrote {out}: {vectors.shape[0]} embeddings of length {vectors.shape[1]}; their files are in {out.with_suffix('.csv')}"
    )
    return 0


def _readable(path: str) -> bool:
    try:
        decode(path)
    except UserError:
        return False
    return True
