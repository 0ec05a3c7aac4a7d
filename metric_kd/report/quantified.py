"""The page of ``metric-kd quantify``: what distillation taught, in numbers, over the images and over the epochs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metric_kd.errors import UserError
from metric_kd.quantify.summary import Curve, EntropyMaps, Estimate, MetricRow, MetricTable
from metric_kd.report import runs
from metric_kd.report.entropy_maps import PERCENTILES, colour_bar, colour_range, tiles
from metric_kd.report.page import render, replace_page
from metric_kd.report.pictures import Picture, chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LETTERS = 5.2, 11
"""Inches of a chart on the page and points of its letters: they can still be read on a telephone."""
COLUMNS = 110
"""Letters of a line below the tables of a terminal."""
STYLES = {
    "teacher": (*runs.STYLES["teacher"], "s"),
    "distilled": (*runs.STYLES["distilled"], "o"),
    "baseline": (*runs.STYLES["alone"], "^"),
}
"""Colour, dashes and marker of a line: each alone tells it from the others."""
EXPECTED = {True: "more in the distilled", False: "less in the distilled", None: ""}


@dataclass(frozen=True)
class QuantifiedReport:
    """What the page shows.

    intro: one paragraph. networks: in the order of the columns, those that are there. tables: side by side, the images
    effective for both networks first. pictures: a handful. notes: what a reader must know, a sentence or two each.
    facts: what is needed to repeat it, shown as given.
    """

    title: str
    intro: str
    networks: Sequence[str]
    tables: Sequence[MetricTable]
    curves: Sequence[Curve] = ()
    pictures: Sequence[EntropyMaps] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.networks or not self.tables:
            raise UserError("a page needs at least one network and one table of metrics; give both.")


class Verdict(NamedTuple):
    """kind: "held", "failed", "unclear" or "none"; remark: how far it goes."""

    kind: str
    words: str = ""
    remark: str = ""


class Line(NamedTuple):
    """A row of the printed table; values: (mean, standard error or "") for every network, ("-", "") where unknown."""

    title: str
    values: list[tuple[str, str]]
    expected: str
    verdict: Verdict

    @property
    def symbol(self) -> str:
        """The last word of a title such as "Concepts in the foreground, N_fg"."""
        return self.title.rpartition(", ")[2]

    @property
    def name(self) -> str:
        """What the symbol stands for, "" where there is none."""
        return self.title.rpartition(", ")[0]


def verdict(row: MetricRow) -> Verdict:
    """Whether the paper's expectation held, in words."""
    if row.more is None:
        return Verdict("none")
    if row.held is None:
        return Verdict("none", "-")
    words = "held" if row.held else "did not hold"
    if row.clear is None:
        return Verdict("unclear", words, "no standard error")
    if not row.clear:
        return Verdict("unclear", words, "within its standard error")
    return Verdict("held" if row.held else "failed", words)


def lines(report: QuantifiedReport, table: MetricTable) -> list[Line]:
    """The rows of one table; a metric has as many decimals in all tables."""
    made = []
    for row in table.rows:
        alike = [other for of in report.tables for other in of.rows if other.key == row.key]
        pattern = _pattern(value for other in alike for value in map(_known, other.values.values()) if value)
        values = [_printed(_known(row.values.get(network)), pattern) for network in report.networks]
        made.append(Line(row.title, values, EXPECTED[row.more], verdict(row)))
    return made


def _known(value: Estimate | None) -> Estimate | None:
    return value if value is not None and math.isfinite(value.mean) else None


def _pattern(values: Iterable[Estimate]) -> str:
    """A format with three digits of the largest mean, or more where a standard error would else be printed as zero."""
    values = list(values)
    largest = max((abs(value.mean) for value in values), default=0.0)
    errors = [value.error for value in values if value.error is not None and value.error > 0]
    if 0 < largest < 1e-4:
        return ".2e"
    decimals = 2 - math.floor(math.log10(largest)) if largest else 0
    if errors:
        decimals = max(decimals, min(-math.floor(math.log10(min(errors))), decimals + 2))
    return f".{max(decimals, 0)}f"


def _printed(value: Estimate | None, pattern: str) -> tuple[str, str]:
    if value is None:
        return "-", ""
    known = value.error is not None and math.isfinite(value.error)
    return format(value.mean, pattern), format(value.error, pattern) if known else ""


def summary(report: QuantifiedReport) -> list[str]:
    """How many of the paper's expectations held, a sentence for each table."""
    sentences = []
    for table in report.tables:
        judged = [row for row in table.rows if row.more is not None and row.held is not None]
        held = [row for row in judged if row.held]
        if not table.images:
            words = "there is none, so there are no numbers"
        elif not judged:
            words = "nothing is compared; that takes a distilled network and a baseline"
        else:
            words = f"{len(held)} of {len(judged)} expectations held"
            clear = sum(row.clear is True for row in held)
            words += f", {clear} of them by more than the standard error" if held else ""
        sentences.append(f"{heading(table)}: {words}.")
    return sentences


def heading(table: MetricTable) -> str:
    """Images effective for both (3 images)."""
    return f"{table.title[:1].upper()}{table.title[1:]} ({table.images} image{'' if table.images == 1 else 's'})"


def gaps(report: QuantifiedReport) -> list[str]:
    """Why a "-" stands in the tables, in one sentence or two; none where there is no "-"."""
    missing = []
    for k, network in enumerate(report.networks):
        symbols = [
            line.symbol
            for table in report.tables
            if table.images
            for line in lines(report, table)
            if line.values[k][0] == "-"
        ]
        missing += [f"{network}: {', '.join(dict.fromkeys(symbols))}"] if symbols else []
    if not missing:
        return []
    return [
        f"-: not known. {'; '.join(missing)}. How concepts were learned (peak, D, rho) needs several checkpoints of the "
        "training, D also the log of its weights (--record_weights), and a share needs at least one concept."
    ]


def table_text(report: QuantifiedReport) -> str:
    """The tables for a terminal, one below the other, then what they say and the notes."""
    text = [report.title, ""]
    for table in report.tables:
        if not table.images:
            continue
        rows = [["", *report.networks, "expected", "outcome"]]
        for title, values, expected, found in lines(report, table):
            numbers = [f"{mean} +- {error}" if error else mean for mean, error in values]
            rows.append([title, *numbers, expected, ", ".join(filter(None, (found.words, found.remark)))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        text += [heading(table), "", *padded, ""]
    said = [fill(line, COLUMNS, subsequent_indent="  ") for line in (*summary(report), *gaps(report), *report.notes)]
    return "\n".join([*text, *said]) + "\n"


CURVES = (
    ("foreground", "Concepts in the foreground", "N_fg (cells)", "More of them: the network uses more of the object."),
    ("background", "Concepts in the background", "N_bg (cells)", "Fewer of them: it leans less on what is around it."),
    ("ratio", "Share of concepts in the foreground", "λ", "The nearer to 1, the more it looks at the object."),
)
"""(field of a curve, what it is, name of the axis, how to read it)."""


def curves(report: QuantifiedReport) -> list[Picture]:
    """Line charts over epochs; none where no network has more than one checkpoint."""
    from matplotlib.figure import Figure

    if all(len(curve.epochs) < 2 for curve in report.curves):
        return []
    pictures = []
    for key, title, name, reading in CURVES:
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.add_subplot()
        told = [words for curve in report.curves if (words := _line(axes, curve, getattr(curve, key), report.networks))]
        if not told:
            continue
        _dress(axes, name, 1.0 if key == "ratio" else None)
        narrow = sum(len(curve.network) for curve in report.curves) < 36
        figure.legend(loc="outside upper left", frameon=False, fontsize=LETTERS, ncols=3 if narrow else 1)
        alone = [curve.network for curve in report.curves if len(curve.epochs) == 1]
        more = f" Level lines without marks: one checkpoint ({', '.join(alone)})." if alone else ""
        caption = f"{title}, {name}, by epoch: the mean over images. {reading}{more}"
        pictures.append(chart(figure, f"Line chart by epoch. {title}, {name}: {'; '.join(told)}.", caption))
    return pictures


def _line(axes: "Axes", curve: Curve, values: np.ndarray, networks: Sequence[str]) -> str:
    """Draw one network and say what was drawn; nothing where no number is known."""
    colour, dashes, marker = style(curve.network, networks)
    known = np.isfinite(values)
    epochs, values = np.asarray(curve.epochs)[known], np.asarray(values)[known]
    looks: dict[str, Any] = {"color": colour, "lw": 2, "label": curve.network.replace("$", r"\$")}
    if not len(values):
        return ""
    if len(curve.epochs) == 1:
        axes.axhline(values[0], ls="--" if dashes == "-" else dashes, **looks)
        return f"{curve.network} {values[0]:.3g}, one checkpoint"
    axes.plot(epochs, values, ls=dashes, marker=marker, ms=5, **looks)
    top = int(values.argmax())
    return (
        f"{curve.network} from {values[0]:.3g} at epoch {epochs[0]} to {values[-1]:.3g} at epoch {epochs[-1]}, "
        f"most {values[top]:.3g} at epoch {epochs[top]}"
    )


def style(network: str, networks: Sequence[str]) -> tuple[str, Any, str]:
    """(colour, dashes, marker) of a network's lines: its role's, else one by its place among the networks."""
    place = list(networks).index(network) if network in networks else 0
    return STYLES.get(network) or (*runs.OTHER_STYLES[place % len(runs.OTHER_STYLES)], "Dvx"[place % 3])


def _dress(axes: "Axes", name: str, top: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(0, top or max(1.08 * axes.dataLim.y1, 1.0))
    axes.set_xlabel("epoch", fontsize=LETTERS)
    axes.set_ylabel(name, fontsize=LETTERS)
    axes.tick_params(labelsize=LETTERS - 1)
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)


def quantified_page(report: QuantifiedReport) -> str:
    """The tables, the maps and the curves as one HTML file that needs no other."""
    limits = colour_range(report.pictures, report.networks)
    return render(
        "quantified.html",
        report=report,
        tables=[(heading(table), table.images, lines(report, table)) for table in report.tables],
        summary=summary(report),
        gaps=gaps(report),
        tiles=tiles(report.pictures, report.networks),
        bar=colour_bar(limits) if limits else None,
        limits=[f"{limit:.2f}" for limit in limits or ()],
        percentiles=PERCENTILES,
        curves=curves(report),
    )


def write_quantified(path: Path | str, report: QuantifiedReport) -> Path:
    """Write the page and return its path; a reader of an older page never sees half of the new one."""
    return replace_page(Path(path), quantified_page(report))
