"""`metric-kd quantify`: what distillation taught a student, by the concepts in one of its layers.

Writes maps.h5 (from which a stopped command goes on), metrics.json and quantify.html into --out.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metric_kd.cli.config import QuantifyConfig
from metric_kd.cli.parse import parse
from metric_kd.cli.subjects import Images, Looked, images_of, load_network, networks_of
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import write_text
from metric_kd.engine.reproducibility import environment
from metric_kd.engine.run_directory import RunDirectory, check_folder
from metric_kd.errors import UserError
from metric_kd.quantify.concepts import effective
from metric_kd.quantify.discarding import Search, entropy
from metric_kd.quantify.maps import MapStore, Subject, fill
from metric_kd.quantify.summary import Curve, EntropyMaps, MetricTable, Quantified, curve, metric_table
from metric_kd.report.quantified import QuantifiedReport, table_text, write_quantified

MAPS, METRICS, PAGE = "maps.h5", "metrics.json", "quantify.html"


def main(arguments: Sequence[str], program: str | None = None) -> int:
    config: Any = parse("quantify", arguments, program).config
    assert isinstance(config, QuantifyConfig)
    search = _search(config)
    out = Path(config.out or _default_out(config))
    check_folder(out, "--out")
    device = choose_device(config.device)
    notes: list[str] = []
    networks = networks_of(config, notes)
    images = images_of(config, networks, notes)
    if min(images.views) < search.grid:
        raise UserError(
            f"a grid of {search.grid} cells does not fit images of {min(images.views)} px; give a smaller --grid."
        )
    if config.dry_run:
        print("\n".join([*_plan(networks, images), *notes]))
        return 0
    with RunDirectory(out).locked():
        if config.resume == "never":
            for name in (MAPS, METRICS, PAGE):
                (out / name).unlink(missing_ok=True)
        store = MapStore(out / MAPS, _settings(config, search, networks, images), len(images.names), search.grid)
        subjects = [Subject(n.name, n.checkpoints, n.layer, n.relu, images.views[n.size]) for n in networks]
        fill(store, subjects, search, load_network, device=device, seed=config.seed, batch=config.batch)
        report = _report(config, store, networks, images, notes)
        write_text(out / METRICS, json.dumps(_plain(config, report, device), indent=2, allow_nan=False) + "\n")
        write_quantified(out / PAGE, report)
    print(f"{table_text(report)}\nwrote {out / METRICS} and {out / PAGE}")
    return 0


def _search(config: QuantifyConfig) -> Search:
    for key, least in (("count", 1), ("pictures", 0), ("seed", 0), ("batch", 1)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"--{key} is {value}; give {least} or more.")
    if config.threshold < 0:
        raise UserError(f"--threshold is {config.threshold}; give 0 nats or more.")
    return Search(
        grid=config.grid,
        draws=config.draws,
        antithetic=config.antithetic,
        iterations=config.iterations,
        lam=config.lam,
        target=config.target,
        form=config.form,
    )


def _settings(config: QuantifyConfig, search: Search, networks: Sequence[Looked], images: Images) -> dict[str, Any]:
    """What the maps depend on, but for the checkpoints; "relu" is said of every network."""
    pixels = hashlib.sha256()
    for size in sorted(images.views):
        pixels.update(images.views[size].contiguous().numpy().tobytes())
    layers = {f"layer of {n.name}": [n.layer, n.relu] for n in networks}
    searched = {key: value for key, value in asdict(search).items() if key != "relu"}
    return {**searched, "seed": config.seed, "images": pixels.hexdigest()[:16], **layers}


def _default_out(config: QuantifyConfig) -> str:
    """runs/quantify-<hash of the flags>, without those that only decide how the maps are summed up."""
    summing = ("threshold", "background", "distance", "empty", "pictures", "device", "out", "resume", "dry_run")
    content = {key: value for key, value in asdict(config).items() if key not in summing}
    return f"runs/quantify-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"


def _plan(networks: Sequence[Looked], images: Images) -> list[str]:
    count = len(images.names)
    lines = [f"{count} of the {images.source}, foreground {100 * images.foreground.mean():.0f} % of the cells"]
    for network in networks:
        epochs = ", ".join(map(str, network.checkpoints))
        lines.append(f"{network.name}: layer {network.layer} at {network.size} px, epochs {epochs}")
    return [*lines, f"{count * sum(len(n.checkpoints) for n in networks)} maps to search"]


def _report(
    config: QuantifyConfig, store: MapStore, networks: Sequence[Looked], images: Images, notes: list[str]
) -> QuantifiedReport:
    maps = {n.name: entropy(torch.from_numpy(store.of(n.name, list(n.checkpoints)))).numpy() for n in networks}
    good = ~np.any([np.isnan(found).any((1, 2, 3)) for found in maps.values()], axis=0)
    if not good.all():
        notes.append(
            f"{(~good).sum()} images are left out: some network's feature does not answer to noise in them at all."
        )
    if not good.any():
        raise UserError(f"layer {config.layer!r} answers to noise in none of the images; choose another layer.")
    notes += _off_target(config, [maps[n.name][good] for n in networks])
    foreground = images.foreground[good]
    there = [Quantified(n.name, np.array(list(n.checkpoints)), maps[n.name][good], n.distance) for n in networks]
    students = [q for q in there if q.name != "teacher"] or there
    chosen = np.all([effective(q.entropy, foreground, q.epochs) for q in students], axis=0)
    if not chosen.any():
        notes.append("No image is effective for both, so the curves are over all of them.")
    switches: dict[str, Any] = {"threshold": config.threshold, "background": config.background}
    whose = "effective for both" if len(students) > 1 else f"effective for the {students[0].name}"
    tables: list[MetricTable] = [
        metric_table(f"images {whose}", there, foreground, chosen, empty=config.empty, **switches),
        metric_table(
            "all images", there, foreground, np.ones(len(foreground), dtype=bool), empty=config.empty, **switches
        ),
    ]
    curves: list[Curve] = [
        curve(q, foreground, chosen if chosen.any() else np.ones_like(chosen), **switches) for q in there
    ]
    rows = np.flatnonzero(good)
    shown = np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])[: config.pictures]
    largest = images.views[max(images.views)]
    pictures = [
        EntropyMaps(
            images.names[rows[k]],
            largest[rows[k]].permute(1, 2, 0).contiguous().numpy(),
            foreground[k],
            {q.name: q.entropy[k, -1] for q in there},
        )
        for k in shown
    ]
    return QuantifiedReport(
        title=f"What distillation taught: concepts in layer {config.layer}",
        intro=_intro(config, networks, images),
        networks=[n.name for n in networks],
        tables=tables,
        curves=curves,
        pictures=pictures,
        notes=notes,
        facts=_facts(config, networks, images),
    )


def _off_target(config: QuantifyConfig, maps: Sequence[np.ndarray]) -> list[str]:
    """Maps are comparable at the same mean entropy; say how many are not there."""
    levels = np.concatenate([found.mean((2, 3)).ravel() for found in maps])
    off = np.abs(levels - config.target) > 0.1
    if config.form == "paper" or not off.any():
        return []
    return [
        f"{off.sum()} of {len(off)} maps ended more than 0.1 nats beside the mean entropy of {config.target:g} at which maps are "
        f"compared (they reach from {levels.min():.2f} to {levels.max():.2f}); more --iterations or another --lam brings them "
        "nearer."
    ]


def _intro(config: QuantifyConfig, networks: Sequence[Looked], images: Images) -> str:
    cells = f"{config.grid} x {config.grid}"
    return (
        f"In each of {len(images.names)} images, the noise was searched that each of {cells} cells may carry before the feature "
        f"of layer {config.layer} changes. Cells that may carry markedly less than the background are called concepts. "
        "Method and expectations: Cheng, Rao, Chen, Zhang, Explaining Knowledge Distillation by Quantifying the Knowledge, "
        "CVPR 2020 (arXiv 2003.03622)."
    )


def _facts(config: QuantifyConfig, networks: Sequence[Looked], images: Images) -> dict[str, str]:
    facts = {"images": images.source, "foreground": config.masks}
    for network in networks:
        epochs = ", ".join(map(str, network.checkpoints))
        facts[network.name] = f"{getattr(config, network.name)}, layer {network.layer}, epochs {epochs}"
    shown = ("draws", "iterations", "target", "form", "threshold", "background", "distance", "empty", "seed")
    facts["search"] = ", ".join(f"{key} {getattr(config, key)}" for key in shown)
    return facts


def _plain(config: QuantifyConfig, report: QuantifiedReport, device: torch.device) -> dict[str, Any]:
    """Everything on the page but the pictures, as plain values; what is not known is null."""
    return {
        "config": {key: value for key, value in asdict(config).items() if key not in ("resume", "dry_run")},
        "environment": environment(device),
        "notes": list(report.notes),
        "tables": [
            {
                "title": table.title,
                "images": table.images,
                "metrics": {
                    row.key: {
                        "title": row.title,
                        **{name: None if value is None else value._asdict() for name, value in row.values.items()},
                        "expected": {True: "more", False: "less", None: None}[row.more],
                        "held": row.held,
                        "clear": row.clear,
                    }
                    for row in table.rows
                },
            }
            for table in report.tables
        ],
        "curves": {
            c.network: {key: getattr(c, key).tolist() for key in ("epochs", "foreground", "background", "ratio")}
            for c in report.curves
        },
    }
