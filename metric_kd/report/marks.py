"""Colours and markers that tell a dozen things apart; either alone does not, both together do, and markers survive print."""

COLOURS = ("#1d4ed8", "#b45309", "#15803d", "#7e22ce", "#9d174d", "#374151")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def mark(place: int) -> tuple[str, str]:
    """(colour, marker) of the thing at a place; a dozen have a marker of their own."""
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
