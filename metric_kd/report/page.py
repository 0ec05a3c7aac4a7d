"""write_page: one HTML file that compares networks; it needs no other file, no script and no connection."""

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from metric_kd import scratch
from metric_kd.durable import umask
from metric_kd.errors import UserError
from metric_kd.report import words
from metric_kd.report.curves import training_curves
from metric_kd.report.gallery import Gallery
from metric_kd.report.pictures import Picture
from metric_kd.report.runs import RunSummary, common_ks, styles

__all__ = ["RunSummary", "write_page"]


def write_page(
    path: Path | str,
    *,
    title: str,
    intro: str,
    runs: Sequence[RunSummary],
    galleries: Sequence[Gallery] = (),
    facts: Mapping[str, str] | None = None,
    figures: Sequence[Picture] | None = None,
) -> Path:
    """Write the page and return its path; a reader of an older page never sees half of the new one.

    intro: one paragraph that says what was done. runs: in the order of the table. facts: what a reader needs to repeat
    it (data, seed, versions), shown as given. figures: instead of the training curves drawn from the runs' histories.
    Raises ``UserError`` without runs or a common K, and where the file cannot be written.
    """
    runs = list(runs)
    if not runs or not common_ks(runs):
        raise UserError("a page needs at least one run, and a K of Recall@K that all runs were evaluated with.")
    html = render(
        "page.html",
        title=title,
        intro=intro,
        runs=runs,
        colours=[colour for colour, _ in styles(runs)],
        ks=common_ks(runs),
        sentences=words.summary(runs),
        figures=training_curves(runs) if figures is None else list(figures),
        galleries=list(galleries),
        facts=dict(facts or {}),
    )
    return replace_page(Path(path), html)


def render(template: str, **content: object) -> str:
    """A template of this package, filled; what is put in is escaped, and a name that is missing raises."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=words.percent, count=words.count, duration=words.duration, folded=words.folded)
    return environment.get_template(template).render(**content)


def _source(template: str) -> str:
    return resources.files("metric_kd.report").joinpath(template).read_text(encoding="utf-8")


def replace_page(path: Path, text: str) -> Path:
    """Write the text and return its path, as a whole or not at all; ``UserError`` where it cannot be written."""
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = scratch.create(path)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        part.chmod(0o666 & ~umask())
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write the page {path} ({error.strerror}); choose another folder.") from error
    return path
