"""`metric-kd export RUN --to onnx|pt2`: one file from pixels to embeddings, checked on real images, with a model card."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metric_kd.cli.beside import check_export
from metric_kd.cli.embedding import embedded
from metric_kd.cli.goals import load_splits
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.cli.session import Session, build, measuring_of
from metric_kd.cli.stored import run_of
from metric_kd.data.records import ImageRecords
from metric_kd.deploy import model_card, parity
from metric_kd.deploy.bridge import Bridge, bridge_from
from metric_kd.deploy.embedder import images_in, no_bridge, pixels_of
from metric_kd.deploy.export import FORMATS, WRITERS, EmbeddingGraph, describe, require_packages
from metric_kd.deploy.exported import Exported
from metric_kd.deploy.int8 import quantise_dynamic, quantise_static
from metric_kd.deploy.lineage import lineage_of
from metric_kd.deploy.names import shown
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint, restore_network, write_atomically, write_text
from metric_kd.engine.run_directory import check_folder
from metric_kd.engine.run_plugins import check_named
from metric_kd.errors import UserError
from metric_kd.models.network import Network
from metric_kd.version import __version__


@dataclass
class Row:
    """One way to run the network: size in bytes, ms per image at each of ``parity.BATCHES``, Recall@1 where measured."""

    name: str
    bytes: int
    ms: list[float]
    recall: float | None = None


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    config = run_of(options.run).stored_config() or {}
    out = _checked(options)
    load_plugins(options.plugins)
    check_named(options.run, config, options.plugins)
    network = restore_network(options.run, None, {}).to(choose_device(options.device)).eval().requires_grad_(False)
    graph = EmbeddingGraph(network, _bridge(options)).eval()
    session, reason = _session(options, config)
    try:
        samples = _samples(options.images, None if session is None else session.test.records, options.count, reason)
        calibrating = _calibrating(options, session, reason) if options.int8 == "static" else []
        with tempfile.TemporaryDirectory() as folder:
            made, measured = _export(options, graph, samples, calibrating, session, Path(folder), out)
            if reason and not options.skip_recall:
                _say(measured, f"Recall@1 was not measured: {reason}")
            _write(options, out, made, measured, config)
    finally:
        if session is not None:
            session.close()
    return 0


def _checked(options: Any) -> Path:
    """Where the file goes; every refusal that needs neither network nor data."""
    find_checkpoint(options.run)
    if options.bridge and "bridge" not in read_checkpoint(options.run):
        raise no_bridge(options.run)
    if options.to == "pt2" and options.int8 is not None:
        raise UserError("--int8 is for --to onnx; leave it out, or export to ONNX.")
    if options.calibration is not None and options.int8 != "static":
        raise UserError("--calibration is for --int8 static; leave it out, or give both.")
    if options.to == "onnx" and options.device == "cuda":
        raise UserError("--device is where a .pt2 file runs; an ONNX file is checked on the CPU, leave it out.")
    if options.count < 1:
        raise UserError(f"--count is {options.count}; give 1 or more.")
    suffix = f".{options.to}"
    kind = "" if options.int8 is None else f".int8-{options.int8}"
    run = Path(options.run)
    default = run / f"{run.resolve().name}{kind}{suffix}" if run.is_dir() else run.with_suffix(f"{kind}{suffix}")
    out = default if options.out is None else Path(options.out)
    if out.suffix != suffix or out.is_dir():
        raise UserError(f"--out {out} must be a file that ends in {suffix}.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; create it first.")
    check_folder(out.absolute().parent, "--out")
    check_export(out, options.out is not None)
    for flag, folder in (("--images", options.images), ("--calibration", options.calibration)):
        if folder is not None:
            images_in(folder, flag)
    require_packages(options.to)
    return out


def _session(options: Any, config: dict[str, Any]) -> tuple[Session | None, str]:
    """The run's own test images, or None and why they are not there."""
    if not config:
        return None, f"{options.run} is no run, which would say what its test images are."
    if options.skip_recall and options.images is not None and (options.int8 != "static" or options.calibration):
        return None, "--skip_recall."
    try:
        return build(measuring_of(options.run, config, plugins=options.plugins, device=options.device)), ""
    except UserError as error:
        return None, str(error)


def _bridge(options: Any) -> Bridge | None:
    """What --bridge puts into the graph."""
    stored = read_checkpoint(options.run).get("bridge") if options.bridge else None
    return None if stored is None else bridge_from(stored)


def _description(options: Any, graph: EmbeddingGraph, out: Path) -> dict[str, str]:
    lineage = lineage_of(find_checkpoint(options.run), options.bridge)
    return describe(graph, out.name.split(".")[0], __version__, lineage)


def _samples(folder: str | None, records: ImageRecords | None, count: int, reason: str) -> list[Any]:
    """Images, evenly spread over a folder, or else over the records. Raises ``UserError`` where one cannot be read."""
    source: Any
    if folder is not None:
        source = images_in(folder)
    elif records is not None:
        source = records.paths if records.paths is not None else records.pixels
    else:
        raise UserError(f"there are no images to check the file on: {reason} Give a folder, as --images DIR.")
    rows = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    chosen = [source[row] for row in rows]
    for image in chosen:
        try:
            pixels_of(image)
        except UserError as error:
            raise UserError(str(error).replace(", or use --skip_unreadable", "")) from error
    return chosen


def _calibrating(options: Any, session: Session | None, reason: str) -> list[Any]:
    """Images for --int8 static: those of the folder, or else training images: what is tested must not be looked at."""
    if options.calibration is not None:
        return _samples(options.calibration, None, options.count, "")
    if session is None:
        raise UserError(f"--int8 static has no calibration images: {reason} Give a folder, as --calibration DIR.")
    return _samples(None, load_splits(session.config).train, options.count, "")


def _export(
    options: Any,
    graph: EmbeddingGraph,
    samples: list[Any],
    calibrating: list[Any],
    session: Session | None,
    folder: Path,
    out: Path,
) -> tuple[Path, dict[str, Any]]:
    """(the file to keep, what was measured); ``UserError`` where it does not do what the network does."""
    plain = folder / f"plain.{options.to}"
    WRITERS[options.to](graph, plain, _description(options, graph, out))
    exported = Exported(plain)
    found = parity.check_parity(graph, exported, samples)
    measured: dict[str, Any] = {"parity": asdict(found), "lines": [], "rows": []}
    if np.isnan(found.difference):
        raise UserError(
            "the network gives embeddings that are not finite; nothing was written, give another checkpoint."
        )
    if not found.difference <= parity.TOLERANCE:
        raise UserError(
            f"the exported file differs from PyTorch by {found.difference:.2g}, more than {parity.TOLERANCE:g}; nothing was "
            "written, try the other --to."
        )
    _say(
        measured,
        f"parity: on {found.images} images, alone and in batches, the file differs from PyTorch by at most "
        f"{found.difference:.1e} ({parity.TOLERANCE:g} is allowed)",
    )
    _say(
        measured,
        f"cosine to what `metric-kd embed` gives, which resizes by PyTorch's own kernel: {found.cosine:.6f} or more",
    )
    batch = parity.squares(samples[: max(parity.BATCHES)], graph.side)
    kept, quantised = plain, None
    if options.int8 is not None:
        kept = folder / "int8.onnx"
        if options.int8 == "static":
            quantise_static(plain, kept, (parity.squares([image], graph.side).numpy() for image in calibrating))
        else:
            quantise_dynamic(plain, kept)
        quantised = Exported(kept)
        near = parity.check_parity(graph, quantised, samples)
        measured["int8"] = asdict(near)
        _say(measured, f"int8 ({options.int8}): cosine to `metric-kd embed` {near.cosine:.4f} or more")
    weights = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    rows = [Row("PyTorch", weights, parity.milliseconds(lambda x: parity.run_graph(graph, x), batch))]
    runtime = "ONNX Runtime" if options.to == "onnx" else "torch.export"
    rows.append(Row(f"{runtime}, fp32", plain.stat().st_size, parity.milliseconds(exported.run, batch)))
    if quantised is not None:
        times = parity.milliseconds(quantised.run, batch)
        rows.append(Row(f"{runtime}, int8 {options.int8}", kept.stat().st_size, times))
    if session is not None and not options.skip_recall:
        _measure_recall(rows, graph, session, [exported, *([quantised] if quantised else [])])
    _report(measured, rows, graph.side)
    return kept, measured


def _measure_recall(rows: list[Row], graph: EmbeddingGraph, session: Session, files: list[Exported]) -> None:
    """Of PyTorch by the evaluation's own views, of files from the images as they lie on the disk."""
    records = session.test.records
    assert isinstance(session.student, Network)
    session.student.to(session.device)
    found = embedded(session, session.student)
    if graph.bridge is not None:
        found = found._replace(vectors=graph.bridge(found.vectors))
    rows[0].recall = parity.retrieval_recall(found, records)
    for row, file in zip(rows[1:], files, strict=True):
        row.recall = parity.recall_at_1(file, records, progress=True)


def _report(measured: dict[str, Any], rows: list[Row], side: int) -> None:
    """Print and keep the table, and what int8 costs."""
    one, many = parity.BATCHES
    print(f"{'':26}{'MB':>9}{f'ms at {one}':>11}{f'ms at {many}':>11}{'Recall@1':>11}")
    for row in rows:
        recall = "" if row.recall is None else f"{100 * row.recall:.2f}"
        print(f"{row.name:26}{row.bytes / 1e6:9.2f}{row.ms[0]:11.2f}{row.ms[1]:11.2f}{recall:>11}")
        measured["rows"].append({"name": row.name, "bytes": row.bytes, "ms": row.ms, "recall@1": row.recall})
    _say(measured, f"ms are per image of {side} x {side} px, on {torch.get_num_threads()} threads")
    pytorch, plain, *quantised = rows
    if pytorch.recall is not None and plain.recall is not None:
        change = 100 * (plain.recall - pytorch.recall)
        _say(measured, f"Recall@1 from image files through the exported file: {change:+.2f} points to evaluation")
    for row in quantised:
        lost = ""
        if row.recall is not None and plain.recall is not None:
            lost = f"{100 * (row.recall - plain.recall):+.2f} points of Recall@1, "
        size = row.bytes / plain.bytes
        speed = " and ".join(f"{b / a:.2f}" for a, b in zip(plain.ms, row.ms, strict=True))
        _say(measured, f"int8 against fp32: {lost}{size:.2f} of the size, {speed} of the time at {one} and {many}")


def _say(measured: dict[str, Any], line: str) -> None:
    print(line)
    measured["lines"].append(line)


def _write(options: Any, out: Path, made: Path, measured: dict[str, Any], config: dict[str, Any]) -> None:
    """The cards first, the file last: where a new file is, its card is."""
    content = made.read_bytes()
    measured["sha256"] = hashlib.sha256(content).hexdigest()
    run = run_of(options.run)
    recorded = run.card_content() if run.card.is_file() else {}
    metadata = Exported(made).metadata
    card = model_card.contents(out.name, options.device, metadata, recorded, config, measured)
    write_text(Path(f"{out}.md"), model_card.text(card, options.to))
    write_text(Path(f"{out}.json"), json.dumps(card, indent=2) + "\n")
    write_atomically(out, lambda file: file.write(content))
    name = shown(out)
    print(f"wrote {name} ({len(content) / 1e6:.2f} MB), its card {name}.md and the card's numbers {name}.json")


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", type=str, help="run directory or checkpoint")
    parser.add_argument("--to", type=Literal[FORMATS], required=True, help="ONNX, or a program for torch.export.load")
    parser.add_argument(
        "--out", type=str | None, default=None, help="file to write; default in the run, under its name"
    )
    parser.add_argument(
        "--bridge", action="store_true", help="into the teacher's space, by the student's stored bridge"
    )
    parser.add_argument(
        "--int8", type=Literal["dynamic", "static"] | None, default=None, help="8 bits: weights, or activations as well"
    )
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        help="images for --int8 static; default the run's training images",
    )
    parser.add_argument(
        "--images", type=str | None, default=None, help="images to check the file on; default the run's test images"
    )
    parser.add_argument("--count", type=int, default=100, help="images to check, and to calibrate, at most")
    parser.add_argument("--skip_recall", action="store_true", help="do not measure Recall@1 on the run's test images")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where a .pt2 file runs")
    add_plugins(parser)
    return parser
