"""A table of numbers between 0 and 1 as a picture: the darker, the larger."""

import base64
from collections.abc import Sequence

from metric_kd.report.pictures import chart

LETTERS = 11


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], words: tuple[str, str, str]
) -> bytes:
    """A PNG of ``values[row][column]``; ``words``: the title, what the rows are, what the columns are."""
    from matplotlib.figure import Figure

    title, left, below = words
    figure = Figure(figsize=(1.9 + 0.78 * len(columns), 1.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            colour = "white" if value > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=LETTERS - 1, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=LETTERS - 1)
    axes.set_yticks(range(len(rows)), rows, fontsize=LETTERS - 1)
    axes.set_xlabel(below, fontsize=LETTERS)
    axes.set_ylabel(left, fontsize=LETTERS)
    axes.set_title(title, fontsize=LETTERS, loc="left")
    return base64.b64decode(chart(figure, title).source.partition(",")[2])
