"""What came of a comparison: results of its runs, sentences about them, and the files that hold both."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metric_kd.cli.comparison import CONTROL, Comparison, Row, main_metric
from metric_kd.cli.config import DistillConfig
from metric_kd.engine.checkpoint import write_atomically, write_text
from metric_kd.engine.older_run import read_object
from metric_kd.engine.written import Written
from metric_kd.report.comparison import (
    ComparedRow,
    ComparisonReport,
    Spread,
    bar_chart,
    comparison_page,
    table_text,
)

FILES = ("table.txt", "results.json", "comparison.png", "comparison.html")
SLOWER = 1.1
"""A method that takes this many times the control's seconds is said to have had more compute."""


@dataclass(frozen=True)
class Result:
    """Of one run: final metrics on the test images (fractions), seconds of training and evaluation, environment."""

    folder: str
    metrics: dict[str, float]
    seconds: float
    environment: dict[str, Any]


@dataclass
class Outcome:
    """Of one row. held_out: weight -> metric on held-out training data, averaged; refused: weight -> why it has none."""

    row: Row
    weight: str = ""
    held_out: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    runs: dict[int, Result] = field(default_factory=dict)
    failure: str = ""

    @property
    def seconds(self) -> float | None:
        """Of one run, on average over the seeds."""
        return sum(run.seconds for run in self.runs.values()) / len(self.runs) if self.runs else None


def report_of(comparison: Comparison, outcomes: Sequence[Outcome], control_words: str) -> ComparisonReport:
    """Everything for the reader, with the notes that keep the numbers honest."""
    config = comparison.alone.only.config
    key, title = main_metric(config)
    rows = [
        ComparedRow(
            outcome.row.name,
            {seed: run.metrics[key] for seed, run in outcome.runs.items()},
            outcome.seconds,
            outcome.weight,
            ", ".join(outcome.row.candidates[outcome.weight].config.loss or []),
            outcome.failure,
        )
        for outcome in outcomes
    ]
    teachers = {c.teacher_load for c in _configs(comparison) if isinstance(c, DistillConfig) and c.teacher_load}
    facts = {
        "Data": config.dataset,
        "Student": config.base,
        "Teacher": ", ".join(sorted(teachers)) or "none",
        "Epochs": f"{config.epochs}, batches of {config.batch}",
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    }
    title_line = f"{title} in % on {config.dataset}: student {config.base}, {config.epochs} epochs"
    return ComparisonReport(title_line, title, rows, _notes(comparison, outcomes, control_words), facts)


def _configs(comparison: Comparison) -> list[Any]:
    return [row.only.config for row in (comparison.alone, *comparison.methods.values())]


def _notes(comparison: Comparison, outcomes: Sequence[Outcome], control_words: str) -> list[str]:
    notes = [f"control: {control_words}."]
    control = next((o.seconds for o in outcomes if o.row.name == CONTROL and not o.failure), None)
    slow = [o.row.name for o in outcomes if not o.failure and control and o.seconds and o.seconds > SLOWER * control]
    if slow:
        notes.append(f"Not at equal compute: one run of {', '.join(slow)} took longer than one of control.")
    views = max(getattr(config, "views", 0) for config in _configs(comparison))
    if views:
        notes.append(f"alone and control see new crops in every epoch, the methods {views} fixed ones of every image.")
    what = "images" if comparison.alone.only.config.task == "classification" else "classes"
    for outcome in outcomes:
        name = outcome.row.name
        if outcome.held_out:
            tried = ", ".join(f"{w} ({100 * v:.2f})" for w, v in outcome.held_out.items())
            notes.append(
                f"{name}: weight {outcome.weight} was chosen among {tried}, in % on held-out training {what} of "
                f"{_seeds(comparison.search_seeds)}; rows without weights had nothing to choose."
            )
        notes += [f"{name}: weight {weight} failed: {why}" for weight, why in outcome.refused.items()]
        config = outcome.row.only.config
        if isinstance(config, DistillConfig) and config.mutual:
            notes.append(f"{name}: no teacher, but {', '.join(config.mutual)} trained along; its time includes that.")
    return notes + _differences(outcomes)


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _differences(outcomes: Sequence[Outcome]) -> list[str]:
    """What the runs of a comparison should share and do not."""
    runs = [run for outcome in outcomes for run in outcome.runs.values()]
    sentences = {
        "teacher": "The runs did not all see the same teacher: it changed in between; repeat the older runs.",
        "data": "The runs did not all see the same training data; repeat the older runs.",
        "device": "The runs were made on different devices: their times cannot be compared.",
    }
    found = {key: {run.environment[key] for run in runs if key in run.environment} for key in sentences}
    return [sentence for key, sentence in sentences.items() if len(found[key]) > 1]


def written_in(folder: Path) -> Written:
    """The files of a comparison in its save_dir, which are the only ones that it replaces."""

    def older() -> list[str]:
        names = list(FILES) if {"metric", "seeds", "rows"} <= read_object(folder / "results.json").keys() else []
        plan = {"control_epochs", "reference"} <= read_object(folder / "plan.json").keys()
        return [*names, *(["plan.json"] if plan else [])]

    return Written(folder, older)


def write_results(comparison: Comparison, outcomes: Sequence[Outcome], report: ComparisonReport) -> list[Path]:
    """Write table.txt, results.json, comparison.png and comparison.html into save_dir; returns their paths."""
    folder = comparison.save_dir
    written = written_in(folder)
    files = [written.claim(folder / name) for name in FILES]
    write_text(files[0], table_text(report))
    write_text(files[1], json.dumps(_numbers(comparison, outcomes, report), indent=2) + "\n")
    picture = bar_chart(report)
    write_atomically(files[2], lambda file: file.write(picture))
    write_text(files[3], comparison_page(report))
    return files


def _numbers(comparison: Comparison, outcomes: Sequence[Outcome], report: ComparisonReport) -> dict[str, Any]:
    """All numbers, unrounded; metrics and their differences are fractions."""
    rows = []
    for outcome, row in zip(outcomes, report.rows, strict=True):
        against = {other.name: row.against(other) for other in report.baselines}
        rows.append(
            {
                "name": row.name,
                "losses": outcome.row.candidates[outcome.weight].config.loss,
                "weight": outcome.weight or None,
                "held_out": outcome.held_out,
                "failure": outcome.failure or None,
                "runs": {
                    str(seed): {"folder": run.folder, "metrics": run.metrics, "seconds": run.seconds}
                    for seed, run in outcome.runs.items()
                },
                "result": _spread(row.spread),
                "against": {name: _spread(value) for name, value in against.items() if value is not None},
                "seconds": row.seconds,
            }
        )
    config = comparison.alone.only.config
    return {
        "metric": main_metric(config)[0],
        "seeds": comparison.seeds,
        "search_seeds": comparison.search_seeds,
        "epochs": config.epochs,
        "rows": rows,
        "notes": list(report.notes),
        "facts": dict(report.facts),
    }


def _spread(value: Spread | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return {"mean": value.mean, "deviation": value.deviation, "n": value.n, "within_noise": value.within_noise}
