"""write_run_report: one HTML file about trained runs; it needs no other file, no script and no connection."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metric_kd.report.cost import Offer, pareto, short
from metric_kd.report.curves import loss_curves, metric_curves
from metric_kd.report.embedding_map import NAMES, embedding_map, require
from metric_kd.report.gallery import Gallery, retrieval_gallery
from metric_kd.report.measured import Measured, TestSet
from metric_kd.report.page import render, replace_page
from metric_kd.report.pictures import Picture
from metric_kd.report.run_words import differences, summary
from metric_kd.report.term_curves import share_curves, term_curves

MAPS = {"none": (), "pca": ("pca",), "tsne": ("pca", "tsne"), "umap": ("pca", "umap")}
"""--map -> the maps that are drawn."""
NEIGHBOURS, SIDE = 5, 128
"""Of a query in a gallery, and pixels of the longer side of a picture there."""
AGAINST_TEACHER = (
    ("broken", "The teacher is right, the student wrong", "What was lost on the way."),
    ("fixed", "The student is right, the teacher wrong", "What the student finds although its teacher does not."),
    ("both_right", "Hits of both", "What was kept."),
    ("both_wrong", "Misses of both", "What neither finds."),
)
"""Groups of queries, as :mod:`metric_kd.report.gallery` names them for (teacher, student)."""


def write_run_report(
    path: "Path | str",
    tests: Sequence[TestSet],
    *,
    title: str,
    intro: str,
    notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    examples: int = 3,
    maps: str = "pca",
) -> Path:
    """Write the page and return its path; a reader of an older page never sees half of the new one.

    tests: only networks of one of them are compared. notes: what is left out, and why. examples: queries of each group of
    a gallery; 0 for no galleries. maps: a key of ``MAPS``. Raises ``UserError`` where a map's package is missing, or the
    file cannot be written.
    """
    require(maps)
    galleries = [gallery for test in tests for gallery in galleries_of(test, examples)] if examples else []
    html = render(
        "report.html",
        title=title,
        intro=intro,
        sections=[_section(test, len(tests) > 1) for test in tests],
        galleries=galleries,
        maps=[named for test in tests for named in maps_of(test, MAPS[maps], len(tests) > 1)],
        runs=[network for test in tests for network in test.networks if network.recipe is not None],
        notes=list(notes),
        facts=dict(facts or {}),
        short=short,
    )
    return replace_page(Path(path), html)


def _section(test: TestSet, several: bool) -> dict[str, Any]:
    return {
        "test": test,
        "suffix": f" on {test.name}" if several else "",
        "sentences": summary(test),
        "remarks": differences(test.networks),
        "curves": curves_of(test),
        "pareto": charts_of_cost(test),
        "further": [network for network in test.networks if network.further],
        "embeds": any(network.hits is not None for network in test.networks),
    }


def curves_of(test: TestSet) -> list[Picture]:
    """The main metric, the loss, then the terms and their shares of the gradient, run by run."""
    runs = [network.summary for network in test.networks if network.summary.history]
    if not runs:
        return []
    metric = test.metrics[0]
    key = metric.lower() if "@" in metric else f"top{metric.removeprefix('Top-').split()[0]}"
    pictures = [metric_curves(runs, key, metric), loss_curves(runs)]
    for run in runs:
        pictures += [term_curves(run), share_curves(run)]
    return [picture for picture in pictures if picture is not None]


def galleries_of(test: TestSet, examples: int) -> list[Gallery]:
    """A gallery for each run, beside its teacher where that is on the page; none for classifiers."""
    teachers = {network.teacher for network in test.networks}
    galleries = []
    for run in test.networks:
        teacher = test.network(run.teacher)
        if run.found is None or test.query_images is None or (run.title in teachers and teacher is None):
            continue
        pair = teacher is not None and teacher.found is not None
        shown: list[Measured] = [teacher, run] if pair else [run]  # type: ignore[list-item]
        networks = {network.title: network.found for network in shown}
        galleries.append(
            retrieval_gallery(
                networks,  # type: ignore[arg-type]
                test.query_images,
                test.class_names,
                compare=(shown[0].title, run.title) if pair else None,
                groups=AGAINST_TEACHER if pair else None,
                k=min(NEIGHBOURS, run.found.indices.shape[1]),
                per_group=examples,
                gallery_images=test.gallery_images,
                title=f"What “{run.title}” finds" + (f", beside its teacher “{shown[0].title}”" if pair else ""),
                side=SIDE,
            )
        )
    return galleries


def maps_of(test: TestSet, kinds: Sequence[str], several: bool = False) -> list[tuple[str, list[Picture]]]:
    """[(heading, the same images in every network's embedding)], map by map; none for classifiers."""
    maps = []
    for kind in kinds:
        pictures = [
            embedding_map(network.title, network.vectors, network.labels, test.class_names, kind)
            for network in test.networks
            if network.vectors is not None and network.labels is not None
        ]
        if pictures:
            maps.append((NAMES[kind] + (f" on {test.name}" if several else ""), pictures))
    return maps


def charts_of_cost(test: TestSet) -> list[Picture]:
    """The main metric against time and against parameters; none for a single network."""
    if len(test.networks) < 2:
        return []
    metric = test.metrics[0]
    axes = {
        "ms per image, batches of 64": lambda network: network.cost.ms[1],
        "parameters": lambda network: float(network.cost.parameters),
    }
    return [
        pareto([Offer(n.title, cost(n), n.scores[metric]) for n in test.networks], name, metric)
        for name, cost in axes.items()
    ]
