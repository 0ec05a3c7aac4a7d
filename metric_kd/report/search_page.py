"""write_search_page: what queries found in an index, as one HTML file that needs no other, no script and no connection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metric_kd.data.decode import decode
from metric_kd.errors import UserError
from metric_kd.report.page import render, replace_page
from metric_kd.report.pictures import Picture, photograph


@dataclass(frozen=True)
class Found:
    """One image that was found: name as shown, path, Euclidean distance."""

    name: str
    path: str
    distance: float


@dataclass(frozen=True)
class Asked:
    """A query, name as shown and path, and what it found, nearest first."""

    name: str
    path: str
    found: tuple[Found, ...]


def write_search_page(path: "str | Path", asked: Sequence[Asked], *, count: int, facts: Mapping[str, str]) -> Path:
    """Write the page and return its path. count: images in the index; facts: where it comes from, shown as given.

    An image that is not where it was, or cannot be read any more, is shown as an empty frame with its name. Raises
    ``UserError`` where the page cannot be written.
    """
    pictures: dict[str, Picture | None] = {}

    def picture(where: str, alt: str) -> Picture | None:
        if where not in pictures:
            try:
                pictures[where] = photograph(decode(where).permute(1, 2, 0).numpy(), alt)
            except UserError:
                pictures[where] = None
        shown = pictures[where]
        return None if shown is None else replace(shown, alt=alt)

    rows = [
        {
            "name": query.name,
            "picture": picture(query.path, f"query: {query.name}"),
            "found": [
                {"name": hit.name, "distance": hit.distance, "picture": picture(hit.path, f"found: {hit.name}")}
                for hit in query.found
            ],
        }
        for query in asked
    ]
    title = f"What {asked[0].name} finds" if len(asked) == 1 else f"What {len(asked)} queries find"
    html = render("search.html", title=title, rows=rows, count=count, facts=dict(facts))
    return replace_page(Path(path), html)
