"""A comparison of methods over seeds: its arithmetic, its table, its bar chart and its page."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metric_kd.report.page import render
from metric_kd.report.pictures import Picture, chart
from metric_kd.report.words import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LETTERS = 5.2, 11
"""Inches of a chart on the page and points of its letters: they can still be read on a telephone."""
COLUMNS = 110
"""Letters of a line below the table."""
COLOURS = {"alone": "#b45309", "control": "#7e22ce"}
METHOD_COLOUR = "#1d4ed8"
BASELINES = ("alone", "st", "control")
"""The rows that all others are compared with, where they are there."""


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) over n seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    n: int

    @property
    def within_noise(self) -> bool:
        """Whether the mean is no further from zero than one standard deviation; unknown, so false, for one seed."""
        return self.deviation is not None and abs(self.mean) <= self.deviation


def spread(values: Sequence[float]) -> Spread:
    """Raises ``ValueError`` for no values."""
    if not values:
        raise ValueError("no values have no mean.")
    numbers = np.asarray(values, dtype=np.float64)
    return Spread(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else None, len(numbers))


def chance(seeds: int) -> float:
    """How often the mean of n normal differences around zero is further away than their own standard deviation.

    P(|t| > sqrt(n)) of Student's t with n - 1 degrees of freedom, as an incomplete beta function; two seeds or more.
    """
    from scipy.special import betainc

    return float(betainc((seeds - 1) / 2, 0.5, (seeds - 1) / (2 * seeds - 1)))


@dataclass(frozen=True)
class ComparedRow:
    """values: {seed: main metric as a fraction}; seconds: of one run on average; failure: why there are no values."""

    name: str
    values: Mapping[int, float]
    seconds: float | None = None
    weight: str = ""
    losses: str = ""
    failure: str = ""

    @property
    def spread(self) -> Spread | None:
        return spread([*self.values.values()]) if self.values and not self.failure else None

    def against(self, other: "ComparedRow") -> Spread | None:
        """The difference to another row, seed by seed; None where either failed, and against itself."""
        seeds = [seed for seed in self.values if seed in other.values]
        if self.name == other.name or self.failure or other.failure or not seeds:
            return None
        return spread([self.values[seed] - other.values[seed] for seed in seeds])


@dataclass(frozen=True)
class ComparisonReport:
    """rows in the order of the table; notes: what a reader must know, one sentence or two each; facts: as given."""

    title: str
    metric: str
    rows: Sequence[ComparedRow]
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def row(self, name: str) -> ComparedRow | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def baselines(self) -> list[ComparedRow]:
        return [row for row in map(self.row, BASELINES) if row is not None]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of a row."""
        return max((len(row.values) for row in self.rows if not row.failure), default=0)

    @property
    def ranked(self) -> list[ComparedRow]:
        """The rows that did not fail, best first."""
        return sorted((row for row in self.rows if row.spread), key=lambda row: -_mean(row))


class Cell(NamedTuple):
    text: str
    within_noise: bool = False


def cells(report: ComparisonReport) -> tuple[list[str], list[list[Cell]]]:
    """(titles, rows) of the table, in percent and percentage points; a column in which nothing stands is left out."""
    columns: list[tuple[str, Callable[[ComparedRow], Cell]]] = [
        ("row", lambda row: Cell(row.name)),
        ("weight", lambda row: Cell(row.weight)),
        ("seeds", lambda row: Cell(str(len(row.values)) if row.spread else "")),
        (report.metric, lambda row: Cell(percent(row.spread) if row.spread else "failed")),
        *((f"against {other.name}", partial(_against, other)) for other in report.baselines),
        ("per run", lambda row: Cell("" if row.seconds is None else duration(row.seconds))),
    ]
    table = [[make(row) for _, make in columns] for row in report.rows]
    kept = [k for k in range(len(columns)) if any(line[k].text for line in table)]
    return [columns[k][0] for k in kept], [[line[k] for k in kept] for line in table]


def table_text(report: ComparisonReport) -> str:
    """The table for a terminal, then why rows failed, then the notes."""
    titles, rows = cells(report)
    lines = [titles, *([cell.text + (" ~" if cell.within_noise else "") for cell in row] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(titles))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    failures = [f"{row.name} failed: {row.failure}" for row in report.rows if row.failure]
    words = [fill(line, COLUMNS, subsequent_indent="  ") for line in (*failures, *legend(report), *report.notes)]
    return "\n".join([report.title, "", *text, "", *words]) + "\n"


def legend(report: ComparisonReport) -> list[str]:
    """How to read the numbers, and how far they go."""
    if report.seeds < 2:
        return ["One seed: how far these numbers would move with another is not known; give several seeds."]
    return [
        f"x +- s: mean and standard deviation over seeds; differences, in points, are taken seed by seed ({report.seeds} seeds).",
        "~ within noise: the mean difference is no larger than one standard deviation. A larger one is a hint, no proof: "
        f"with {report.seeds} seeds, {100 * chance(report.seeds):.0f} % of methods without any effect would show one.",
    ]


def percent(value: Spread) -> str:
    return f"{_points(value.mean):.2f}" + _deviation(value)


def _against(other: ComparedRow, row: ComparedRow) -> Cell:
    return _difference(row.against(other))


def _difference(value: Spread | None) -> Cell:
    if value is None:
        return Cell("")
    return Cell(f"{_points(value.mean):+.2f}" + _deviation(value), value.within_noise)


def _deviation(value: Spread) -> str:
    return "" if value.deviation is None else f" +- {_points(value.deviation):.2f}"


def _points(fraction: float) -> float:
    return round(100 * fraction, 2) + 0.0  # no -0.00


def _mean(row: ComparedRow) -> float:
    assert row.spread is not None
    return row.spread.mean


def charts(report: ComparisonReport) -> list[Picture]:
    """For the page: the rows, best first, and what they gained over the student alone; none where every row failed."""
    from matplotlib.figure import Figure

    pictures = []
    alone, rows = report.row("alone"), report.ranked
    if rows:
        figure = Figure(figsize=(WIDTH, _height(rows)), layout="constrained")
        _value_bars(figure.add_subplot(), report, rows)
        told = "; ".join(f"{row.name} {percent(row.spread)}" for row in rows if row.spread)
        words = f"{report.metric}, best first. {_whiskers(report)} Hatched: without a teacher."
        pictures.append(chart(figure, f"Bar chart of {report.metric} in percent, best first: {told}.", words))
    gains = [(row, row.against(alone)) for row in rows] if alone is not None else []
    told = "; ".join(f"{row.name} {_difference(gain).text}" for row, gain in gains if gain)
    if told:
        rows = [row for row, gain in gains if gain]
        figure = Figure(figsize=(WIDTH, _height(rows)), layout="constrained")
        _gain_bars(figure.add_subplot(), report, rows)
        words = f"The difference to the student alone, seed by seed. {_whiskers(report)} Hollow: within noise."
        pictures.append(chart(figure, f"Bar chart of the difference to the student alone, in points: {told}.", words))
    return pictures


def bar_chart(report: ComparisonReport) -> bytes:
    """Both charts side by side, as a PNG for a file."""
    from matplotlib.figure import Figure

    rows = report.ranked
    figure = Figure(figsize=(2 * WIDTH, _height(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    _value_bars(left, report, rows)
    _gain_bars(right, report, rows)
    right.set_yticklabels([])
    return base64.b64decode(chart(figure, "").source.partition(",")[2])


def _height(rows: Sequence[ComparedRow]) -> float:
    return 1.0 + 0.34 * max(len(rows), 1)


def _whiskers(report: ComparisonReport) -> str:
    if report.seeds < 2:
        return "One seed: no spread is known."
    return f"Whiskers: one standard deviation over {report.seeds} seeds to either side."


def _value_bars(axes: "Axes", report: ComparisonReport, rows: Sequence[ComparedRow]) -> None:
    for k, row in enumerate(rows):
        value = row.spread
        assert value is not None
        _bar(axes, k, row, value, percent(value), hollow=False)
    alone = report.row("alone")
    if alone is not None and alone.spread is not None:
        axes.axvline(100 * alone.spread.mean, color=COLOURS["alone"], ls=(0, (2, 2)), lw=1)
    _dress(axes, rows, f"{report.metric} (%)")
    axes.set_xlim(left=0)


def _gain_bars(axes: "Axes", report: ComparisonReport, rows: Sequence[ComparedRow]) -> None:
    alone = report.row("alone")
    for k, row in enumerate(rows):
        gain = row.against(alone) if alone is not None else None
        if gain is not None:
            _bar(axes, k, row, gain, _difference(gain).text, hollow=gain.within_noise)
    axes.axvline(0, color="#111827", lw=1)
    _dress(axes, rows, "difference to alone (points)")


def _bar(axes: "Axes", place: int, row: ComparedRow, value: Spread, words: str, *, hollow: bool) -> None:
    colour = COLOURS.get(row.name, METHOD_COLOUR)
    whisker = None if value.deviation is None else 100 * value.deviation
    style: dict[str, Any] = {"color": "white" if hollow else colour, "edgecolor": colour, "linewidth": 1.5}
    if row.name in COLOURS:
        style |= {"hatch": "///", "edgecolor": colour if hollow else "white"}
    axes.barh(place, 100 * value.mean, 0.66, xerr=whisker, ecolor="#111827", capsize=3, **style)
    # Beside the axes, where neither a bar nor a whisker can cover it.
    axes.text(
        1.02, place, words.replace("+-", "±"), transform=axes.get_yaxis_transform(), va="center", fontsize=LETTERS - 1
    )


def _dress(axes: "Axes", rows: Sequence[ComparedRow], below: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=LETTERS)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(COLOURS.get(row.name, "#111827"))
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(below, fontsize=LETTERS)
    axes.tick_params(axis="x", labelsize=LETTERS - 1)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def comparison_page(report: ComparisonReport) -> str:
    """The table, the charts and how they came about, as one HTML file that needs no other."""
    titles, rows = cells(report)
    filled = {"report": report, "titles": titles, "rows": rows, "figures": charts(report), "legend": legend(report)}
    return render("comparison.html", **filled)
