"""Training curves: loss and Recall@K by epoch, from the records of metrics.jsonl."""

from typing import TYPE_CHECKING, Any

from metric_kd.report.pictures import Picture, chart
from metric_kd.report.runs import RunSummary, common_ks, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 5.2
"""Inches of a chart: narrow, so that its 11 pt letters can still be read on a telephone."""
LETTERS = 11


def training_curves(runs: list[RunSummary]) -> list[Picture]:
    """The charts that the runs' histories allow: Recall@K (the smallest K), then losses; none without a history."""
    charts = [recall_curves(runs), loss_curves(runs)]
    return [picture for picture in charts if picture is not None]


def recall_curves(runs: list[RunSummary]) -> Picture | None:
    """Recall@K by epoch, K the smallest that all runs have; see :func:`metric_curves`."""
    k = common_ks(runs)[0]
    return metric_curves(runs, f"recall@{k}", f"Recall@{k}")


def metric_curves(runs: list[RunSummary], key: str, name: str) -> Picture | None:
    """A metric by epoch, one line per run; epochs without an evaluation are left out. None where no run has any.

    key: as the records of metrics.jsonl have it, for fractions; name: for people.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.add_subplot()
    told = []
    for run, (colour, dashes) in zip(runs, styles(runs), strict=True):
        points, held_out = _measured(run.history, key)
        if points:
            epochs, values = zip(*points, strict=True)
            label = plain(run.title + (" (held-out training classes)" if held_out else ""))
            axes.plot(epochs, [100 * v for v in values], color=colour, ls=dashes, lw=2, marker="o", ms=4, label=label)
            told.append(f"{run.title} ends at {100 * values[-1]:.1f}% after epoch {epochs[-1]}")
    if not told:
        return None
    dress(axes, "epoch", f"{name} (%)")
    figure.legend(loc="outside upper left", frameon=False, fontsize=LETTERS)
    return chart(
        figure,
        f"Line chart of {name} by epoch: {'; '.join(told)}.",
        f"{name} after each epoch. Higher is better.",
    )


def loss_curves(runs: list[RunSummary]) -> Picture | None:
    """The loss by epoch, one panel per run, because sums of different losses have no common scale."""
    from matplotlib.figure import Figure

    drawn = [
        (run, style)
        for run, style in zip(runs, styles(runs), strict=True)
        if any(record.get("loss") is not None for record in run.history)
    ]
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + 1.45 * len(drawn)), layout="constrained")
    told = []
    for axes, (run, (colour, dashes)) in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
        points = [(record["epoch"], record["loss"]) for record in run.history if record.get("loss") is not None]
        epochs, values = zip(*points, strict=True)
        axes.plot(epochs, values, color=colour, ls=dashes, lw=2, marker="o", ms=3)
        axes.set_title(plain(run.title), fontsize=LETTERS, loc="left", color=colour)
        dress(axes, "epoch" if run is drawn[-1][0] else "", "loss")
        told.append(f"{run.title} from {values[0]:.3g} to {values[-1]:.3g}")
    return chart(
        figure,
        f"Line charts of the training loss by epoch: {'; '.join(told)}.",
        "Mean training loss of each epoch. Each network minimises its own sum of losses: compare shapes, not heights.",
    )


def _measured(history: list[dict[str, Any]], metric: str) -> tuple[list[tuple[int, float]], bool]:
    """([(epoch, fraction)], whether it was measured on held-out training classes)."""
    for key, held_out in ((metric, False), (f"val_{metric}", True)):
        points = [(record["epoch"], record[key]) for record in history if record.get(key) is not None]
        if points:
            return points, held_out
    return [], False


def dress(axes: "Axes", below: str, left: str) -> None:
    """The axes of a chart over epochs."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(below, fontsize=LETTERS)
    axes.set_ylabel(left, fontsize=LETTERS)
    axes.tick_params(labelsize=LETTERS - 1)
    axes.grid(axis="y", color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)


def plain(text: str) -> str:
    """A name that matplotlib shows as it is."""
    return text.replace("$", r"\$")  # matplotlib reads $...$ as mathematics
