"""What a network costs, and what that buys: Pareto charts over networks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from metric_kd.evaluation.statistics import Interval
from metric_kd.modes import eval_mode
from metric_kd.report.curves import LETTERS, WIDTH, plain
from metric_kd.report.marks import mark
from metric_kd.report.pictures import Picture, chart

BYTES = 4
"""Of one number of an embedding that is kept in float32."""


class Cost(NamedTuple):
    """parameters; flops: of one image, a multiplication and an addition being two; ms: per image at batches of 1 and of 64;
    size: numbers of an embedding.
    """

    parameters: int
    flops: int
    ms: tuple[float, float]
    size: int

    @property
    def megabytes(self) -> float:
        """MB (10^6 bytes) of a million embeddings in float32."""
        return float(BYTES * self.size)


def flops_of(network: nn.Module, side: int, answer: str = "embedding") -> int:
    """Floating-point operations of one image of side x side pixels, as torch.utils.flop_counter counts them.

    Convolutions, matrix products and attention are counted, two for a multiplication and an addition; normalisation,
    activations and pooling are not, as is usual. answer: the field of the network's output that is asked for.
    """
    from torch.utils.flop_counter import FlopCounterMode

    image = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=next(network.parameters()).device)
    counter = FlopCounterMode(display=False)
    with eval_mode(network), torch.no_grad(), counter:
        network(image, want=(answer,))
    return int(counter.get_total_flops())


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (cost, quality) points that no other one beats: none costs less, or as much, and is better, nor the reverse.

    Cheapest first; equal points stand there once each.
    """
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    kept: list[int] = []
    for place in order:
        if not kept or points[place][1] > points[kept[-1]][1] or points[place] == points[kept[-1]]:
            kept.append(place)
    return kept


class Offer(NamedTuple):
    """A network of a Pareto chart: its name, what it costs, and its quality (fraction, with its interval)."""

    name: str
    cost: float
    quality: Interval


def pareto(offers: Sequence[Offer], axis: str, metric: str) -> Picture:
    """Quality against cost; a line joins the networks that no other one beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4 + 0.25 * len(offers)), layout="constrained")
    axes = figure.add_subplot()
    best = front([(offer.cost, offer.quality.mean) for offer in offers])
    x, y = [offers[k].cost for k in best], [100 * offers[k].quality.mean for k in best]
    axes.step(x, y, where="post", color="#6b7280", lw=1.2, ls="--", zorder=1)
    for place, offer in enumerate(offers):
        colour, marker = mark(place)
        mean, low, high = (100 * value for value in offer.quality)
        axes.errorbar(
            offer.cost,
            mean,
            yerr=None if low != low else [[mean - low], [high - mean]],
            color=colour,
            marker=marker,
            ms=9,
            capsize=3,
            ls="none",
            label=plain(offer.name),
        )
    if max(offer.cost for offer in offers) > 4 * min(offer.cost for offer in offers):
        _by_factors(axes)
    axes.set_xlabel(axis, fontsize=LETTERS)
    axes.set_ylabel(f"{metric} (%)", fontsize=LETTERS)
    axes.tick_params(labelsize=LETTERS - 1)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=LETTERS)
    told = "; ".join(f"{o.name} {o.cost:.4g} and {100 * o.quality.mean:.1f}%" for o in offers)
    names = ", ".join(offers[k].name for k in best)
    return chart(
        figure,
        f"Scatter plot of {metric} against {axis}: {told}. Not beaten in both: {names}.",
        f"{metric} against {axis}; up and left is better. Whiskers: 95% interval. Broken line: not beaten in both ({names}).",
    )


def _by_factors(axes: object) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    assert isinstance(axes, Axes)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def short(number: float) -> str:
    """1234567 -> 1.23 M: three digits, and a letter for thousands (k), millions, and so on."""
    for limit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"
