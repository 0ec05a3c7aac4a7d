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
from metric_kd.cli.plugins import load_plugins
from metric_kd.cli.subjects import Examined, Images, images_of, networks_of
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import restore_network, write_text
from metric_kd.engine.older_run import names_in
from metric_kd.engine.reproducibility import environment
from metric_kd.engine.run_directory import RunDirectory, check_folder
from metric_kd.engine.written import Written
from metric_kd.errors import UserError
from metric_kd.models.network import Network
from metric_kd.quantify.concepts import effective
from metric_kd.quantify.discarding import entropy
from metric_kd.quantify.maps import PIXELS, MapStore, Subject, feature_of, is_store, search_missing
from metric_kd.quantify.search import Search
from metric_kd.quantify.summary import Curve, EntropyMaps, MetricTable, Quantified, curve, metric_table, unlearned
from metric_kd.report.quantified import QuantifiedReport, table_text, write_quantified

BESIDE = 0.1
"""Nats beside the target: half the threshold of a concept, by which maps of different levels would differ at any rate."""
MAPS, METRICS, PAGE = "maps.h5", "metrics.json", "quantify.html"


def main(arguments: Sequence[str], program: str | None = None) -> int:
    config: Any = parse("quantify", arguments, program).config
    assert isinstance(config, QuantifyConfig)
    load_plugins(config.plugins)
    search = _search(config)
    out = Path(config.out or _default_out(config))
    check_folder(out, "--out")
    written = Written(out, lambda: [*names_in(out), *((MAPS, METRICS, PAGE) if is_store(out / MAPS) else ())])
    written.check((MAPS, METRICS, PAGE))
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
    for network in networks:
        _check_layer(network, images.views[network.size][:1])
    with RunDirectory(out, "--out").locked():
        written.sweep()
        if config.resume == "never":
            written.remove_some((MAPS, METRICS, PAGE))
        for name in (MAPS, METRICS, PAGE):
            written.claim(out / name)
        shape = (len(images.names), search.grid, search.grid)
        store = MapStore(out / MAPS, shape, _settings(config, search, device), _parts(networks, images))
        subjects = [Subject(n.name, n.checkpoints, n.layer, n.relu, images.views[n.size]) for n in networks]
        search_missing(store, subjects, search, _load, device=device, seed=config.seed, batch=config.batch)
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


def _settings(config: QuantifyConfig, search: Search, device: torch.device) -> dict[str, Any]:
    """What all maps depend on."""
    searched = {key: value for key, value in asdict(search).items() if key != "relu"}
    return {**searched, "seed": config.seed, "noise of": device.type}


def _parts(networks: Sequence[Examined], images: Images) -> dict[str, Any]:
    """What the maps of one network depend on, but for its checkpoints."""
    layers = {f"layer of {n.name}": [n.layer, n.relu] for n in networks}
    pixels = {size: hashlib.sha256(view.contiguous().numpy().tobytes()) for size, view in images.views.items()}
    return layers | {f"{PIXELS} {size} px": digest.hexdigest()[:16] for size, digest in pixels.items()}


def _default_out(config: QuantifyConfig) -> str:
    """runs/quantify-<hash of the flags>, without those that only decide how the maps are summed up."""
    summing = {"masks", "threshold", "background", "distance", "empty", "pictures", "epochs", "batch"}
    summing |= {"device", "out", "resume", "dry_run", "plugins"}
    content = {key: value for key, value in asdict(config).items() if key not in summing}
    return f"runs/quantify-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"


def _plan(networks: Sequence[Examined], images: Images) -> list[str]:
    count = len(images.names)
    lines = [f"{count} of the {images.source}, foreground {100 * images.foreground.mean():.0f} % of the cells"]
    for network in networks:
        lines.append(f"{network.name}: layer {network.layer} at {network.size} px, {network.when}")
    return [*lines, f"{count * sum(len(n.checkpoints) for n in networks)} maps to search"]


def _check_layer(network: Examined, image: torch.Tensor) -> None:
    """One pass, so that a layer that is never called, or gives no tensor, is refused before the search."""
    model = _load(next(reversed(network.checkpoints.values()))).eval()
    with feature_of(model, network.layer) as (read, _), torch.no_grad():
        read(image)


def _no_answer(networks: Sequence[Examined], maps: dict[str, np.ndarray]) -> str:
    for network in networks:
        for epoch, found in zip(network.checkpoints, maps[network.name].swapaxes(0, 1), strict=True):
            if np.isnan(found).any((1, 2)).all():
                when = f" at epoch {epoch}" if network.recorded else ""
                why = "a ReLU may have shut it, so try --relu false, or " if network.relu else ""
                return (
                    f"layer {network.layer!r} of the {network.name} network{when} answers to noise in none of the images; "
                    f"{why}choose another layer."
                )
    return "no image has an answer to noise in all networks and epochs; choose another layer, or fewer --epochs."


def _load(path: Path) -> Network:
    return restore_network(path, None, {})


def _report(
    config: QuantifyConfig, store: MapStore, networks: Sequence[Examined], images: Images, notes: list[str]
) -> QuantifiedReport:
    maps = {n.name: entropy(torch.from_numpy(store.of(n.name, list(n.checkpoints)))).numpy() for n in networks}
    good = ~np.any([np.isnan(found).any((1, 2, 3)) for found in maps.values()], axis=0)
    if not good.all():
        notes.append(
            f"{(~good).sum()} images are left out: some network's feature does not answer to noise in them at all."
        )
    if not good.any():
        raise UserError(_no_answer(networks, maps))
    notes += _off_target(config, [maps[n.name][good] for n in networks])
    foreground = images.foreground[good]
    there = [Quantified(n.name, np.array(list(n.checkpoints)), maps[n.name][good], n.distance) for n in networks]
    students = [q for q in there if q.name != "teacher"] or there
    chosen = np.all([effective(q.entropy, foreground, q.epochs) for q in students], axis=0)
    whose = "both" if len(students) > 1 else f"the {students[0].name}"
    everything = np.ones_like(chosen)
    over = chosen if chosen.any() else everything
    if not chosen.any():
        notes.append(f"No image is effective for {whose}, so the curves are over all of them.")
    switches: dict[str, Any] = {"threshold": config.threshold, "background": config.background}
    tables: list[MetricTable] = [
        metric_table(title, there, foreground, rows, empty=config.empty, **switches)
        for title, rows in ((f"images effective for {whose}", chosen), ("all images", everything))
    ]
    curves: list[Curve] = [curve(q, foreground, over, **switches) for q in there]
    notes += _unlearned(config, there, foreground)
    return QuantifiedReport(
        title=f"What distillation taught: concepts in layer {config.layer}",
        intro=_intro(config, networks, images),
        networks=[n.name for n in networks],
        tables=tables,
        curves=curves,
        pictures=_pictures(config, there, images, np.flatnonzero(good), chosen),
        notes=notes,
        facts=_facts(config, networks, images),
    )


def _pictures(
    config: QuantifyConfig, networks: Sequence[Quantified], images: Images, rows: np.ndarray, chosen: np.ndarray
) -> list[EntropyMaps]:
    """Effective images first; ``rows``: of all images those that the networks have maps of."""
    largest = images.views[max(images.views)]
    shown = np.concatenate([np.flatnonzero(chosen), np.flatnonzero(~chosen)])[: config.pictures]
    return [
        EntropyMaps(
            images.names[rows[k]],
            largest[rows[k]].permute(1, 2, 0).contiguous().numpy(),
            images.foreground[rows[k]],
            {q.name: q.entropy[k, -1] for q in networks},
        )
        for k in shown
    ]


def _unlearned(config: QuantifyConfig, networks: Sequence[Quantified], foreground: np.ndarray) -> list[str]:
    """What pulls D down without any learning."""
    notes = []
    for network in networks:
        if network.distance is None:
            continue
        never, first = unlearned(network, foreground, config.threshold, config.background)
        if never:
            counted = "count as 0 in D and rho" if config.empty == "zero" else "are left out of D and rho"
            notes.append(f"{network.name}: {never} images never have a concept in the foreground and {counted}.")
        if first:
            notes.append(
                f"{network.name}: {first} of {len(foreground)} images have most concepts at the first checkpoint (epoch "
                f"{network.epochs[0]}), which gives them the smallest D there is without having learned them."
            )
    return notes


def _off_target(config: QuantifyConfig, maps: Sequence[np.ndarray]) -> list[str]:
    """Maps are comparable at the same mean entropy; say how many are not there."""
    levels = np.concatenate([found.mean((2, 3)).ravel() for found in maps])
    off = np.abs(levels - config.target) > BESIDE
    if config.form == "paper" or not off.any():
        return []
    return [
        f"{off.sum()} of {len(off)} maps ended more than {BESIDE} nats beside the mean entropy of {config.target:g} at which "
        f"maps are compared (they reach from {levels.min():.2f} to {levels.max():.2f}); more --iterations or another --lam "
        "brings them nearer."
    ]


def _intro(config: QuantifyConfig, networks: Sequence[Examined], images: Images) -> str:
    cells = f"{config.grid} x {config.grid}"
    return (
        f"For each of {len(images.names)} images we searched how much noise each of {cells} cells can carry before the feature "
        f"of layer {config.layer} changes noticeably. Cells that can carry clearly less than the background are called concepts. "
        "Method and expectations: Cheng, Rao, Chen, Zhang, Explaining Knowledge Distillation by Quantifying the Knowledge, "
        "CVPR 2020 (arXiv 2003.03622)."
    )


def _facts(config: QuantifyConfig, networks: Sequence[Examined], images: Images) -> dict[str, str]:
    facts = {"images": images.source, "foreground": config.masks}
    for network in networks:
        facts[network.name] = f"{getattr(config, network.name)}, layer {network.layer}, {network.when}"
    shown = ["view", "count", "grid", "draws", "antithetic", "iterations", "lam", "target", "form", "relu"]
    shown += ["threshold", "background", "distance", "empty", "seed"]
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
