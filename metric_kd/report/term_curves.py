"""What each term of a loss did while a run trained: its value, and its share of the gradient where that was recorded."""

from typing import Any

from metric_kd.report.curves import LETTERS, WIDTH, dress, plain
from metric_kd.report.marks import mark
from metric_kd.report.pictures import Picture, chart
from metric_kd.report.runs import RunSummary


def term_curves(run: RunSummary) -> Picture | None:
    """The value of every term by epoch, before its weight, a panel each; None for a single term, which is the loss."""
    from matplotlib.figure import Figure

    terms = _by_term(run.history, "losses")
    if len(terms) < 2:
        return None
    figure = Figure(figsize=(WIDTH, 0.5 + 1.35 * len(terms)), layout="constrained")
    told = []
    for place, (axes, (name, points)) in enumerate(zip(figure.subplots(len(terms)), terms.items(), strict=True)):
        epochs, values = zip(*points, strict=True)
        colour, marker = mark(place)
        axes.plot(epochs, values, color=colour, marker=marker, ms=4, lw=2)
        axes.set_title(plain(name), fontsize=LETTERS, loc="left", color=colour)
        dress(axes, "epoch" if place == len(terms) - 1 else "", "")
        told.append(f"{name} from {values[0]:.3g} to {values[-1]:.3g}")
    return chart(
        figure,
        f"Line charts of the terms of the loss of {run.title} by epoch: {'; '.join(told)}.",
        f"{run.title}: each term of the loss by epoch, before it is weighted.",
    )


def share_curves(run: RunSummary) -> Picture | None:
    """Each term's share of the gradient norm by epoch; None where that was not recorded."""
    from matplotlib.figure import Figure

    terms = _by_term(run.history, "gradient_shares")
    if not terms:
        return None
    figure = Figure(figsize=(WIDTH, 3.4 + 0.22 * len(terms)), layout="constrained")
    axes = figure.add_subplot()
    told = []
    for place, (name, points) in enumerate(terms.items()):
        epochs, values = zip(*points, strict=True)
        colour, marker = mark(place)
        axes.plot(epochs, [100 * v for v in values], color=colour, marker=marker, ms=5, lw=2, label=plain(name))
        told.append(f"{name} from {100 * values[0]:.0f}% to {100 * values[-1]:.0f}%")
    dress(axes, "epoch", "share (%)")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside upper left", frameon=False, fontsize=LETTERS, ncols=2)
    return chart(
        figure,
        f"Line chart of each term's share of the gradient of {run.title} by epoch: {'; '.join(told)}.",
        f"{run.title}: share of each weighted term in the norm of the gradient. A term near 0% hardly teaches anything; "
        "one near 100% drowns the others.",
    )


def _by_term(history: list[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    """{term: [(epoch, value)]}, in the order of the log; epochs without a number are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in history:
        for name, value in (record.get(key) or {}).items():
            if value is not None:
                found.setdefault(name, []).append((record["epoch"], value))
    return found
