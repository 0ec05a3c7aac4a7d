"""What `metric-kd evidence` prints: its numbers as text."""

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3
"""Classes of each kind that are named."""

TITLES = {
    "recall@1": "Recall@1",
    "difference": "difference from the teacher",
    "agreement.overlap": "neighbours shared",
    "agreement.rank_biased_overlap": "rank-biased overlap",
    "agreement.cka": "linear CKA",
    "geometry.hubness": "hubness",
    "geometry.effective_rank": "effective rank",
    "geometry.alignment": "alignment",
    "geometry.uniformity": "uniformity",
}
IN_PERCENT = ("recall@1", "difference")


def evidence_text(report: Mapping[str, Any]) -> str:
    """A report of :func:`metric_kd.evaluation.comparing.compare`, with "student", "teacher" and "dataset", for people."""
    recall, gap, agreed = report["recall@1"], report["difference"], report["agreement"]
    k = report["k"]
    lines = [
        f"{report['student']} against {report['teacher']} on {report['dataset']} ({report['images']} images, "
        f"{report['queries']} queries; 95% intervals over queries)",
        f"Recall@1  student {_percent(recall['student'])}   teacher {_percent(recall['teacher'])}",
        f"difference {_percent(gap, sign=True)}, p = {gap['p']:.2g} (paired, two-sided)",
        f"agreement without labels: {_plain(agreed['overlap'])} of the {k} nearest shared, rank-biased overlap "
        f"{_plain(agreed['rank_biased_overlap'])}, linear CKA {agreed['cka']:.3f}",
    ]
    for name, shape in report["geometry"].items():
        lines.append(
            f"{name}: hubness {shape['hubness']:.2f}, effective rank {shape['effective_rank']:.1f} of "
            f"{shape['dimensions']}, alignment {_number(shape['alignment'])}, uniformity {shape['uniformity']:.3f}"
        )
    return "\n".join([*lines, *_classes(report["classes"])])


def merged_text(merged: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    """Several seeds as one, a line per figure: mean, interval, and what each run has; the notes below."""
    lines = [f"{len(reports)} runs together (mean and 95% interval by Student's t):"]
    for name, title in TITLES.items():
        show = _percent if name in IN_PERCENT else _plain
        lines.append(f"  {title:28} {show(merged[name])}")
    return "\n".join([*lines, *(f"note: {note}" for note in merged["notes"])])


def _classes(classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    def named(order: Sequence[str]) -> str:
        return ", ".join(
            f"{name} {100 * classes[name]['student']:.0f} (teacher {100 * classes[name]['teacher']:.0f})"
            for name in order[:SHOWN]
        )

    by_recall = sorted(classes, key=lambda name: (classes[name]["student"], name))
    by_loss = sorted(classes, key=lambda name: (classes[name]["student"] - classes[name]["teacher"], name))
    apart = sorted(classes, key=lambda name: (classes[name]["agreement"]["overlap"], name))
    alike = ", ".join(f"{name} {classes[name]['agreement']['overlap']:.2f}" for name in apart[:SHOWN])
    lost = [name for name in by_loss if classes[name]["student"] < classes[name]["teacher"]]
    lines = [f"worst classes (Recall@1 in %): {named(by_recall)}", f"best classes: {named(by_recall[::-1])}"]
    lines.append(f"where the student lost most: {named(lost) or 'nowhere'}")
    return [*lines, f"where the two agree least (share of the nearest): {alike}"]


def _percent(interval: Mapping[str, float | None], sign: bool = False) -> str:
    return _interval(interval, 100, "+.2f" if sign else ".2f")


def _plain(interval: Mapping[str, float | None]) -> str:
    return _interval(interval, 1, ".3f")


def _interval(interval: Mapping[str, float | None], factor: float, form: str) -> str:
    mean, low, high = (interval[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "-"
    text = format(factor * mean, form)
    if low is None or high is None:
        return text
    return f"{text} ({format(factor * low, form)} to {format(factor * high, form)})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
