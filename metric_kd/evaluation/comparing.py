"""What can be said of a student beside another network from their embeddings of the same test images: plain numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.analysis import linear_cka
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.evidence import (
    alignment,
    effective_rank,
    hubness,
    neighbour_overlap,
    per_class,
    rank_biased_overlap,
    uniformity,
)
from metric_kd.evaluation.metrics import hits_at_k
from metric_kd.evaluation.retrieval import evaluate_retrieval
from metric_kd.evaluation.statistics import Interval, bootstrap, merged, paired
from metric_kd.types import Neighbours

PAIRS_OF = 10_000
"""Embeddings, at equal distances in their order, among which uniformity compares pairs."""

MERGED = (
    "recall@1",
    "difference",
    *(f"agreement.{name}" for name in ("overlap", "rank_biased_overlap", "cka")),
    *(f"geometry.{name}" for name in ("hubness", "effective_rank", "alignment", "uniformity")),
)
"""The figures of a student of which several seeds make one."""


class Sides(NamedTuple):
    """Embeddings of the same images by two networks, in the same order, and which of them ask and answer (None: all).

    query, gallery: bool, one entry per row of the data set.
    """

    student: Embeddings
    teacher: Embeddings
    query: np.ndarray | None = None
    gallery: np.ndarray | None = None


def compare(sides: Sides, class_names: Sequence[str], k: int = 10) -> dict[str, Any]:
    """What :class:`Sides` say, as plain values that JSON holds.

    "recall@1": of both, with the 95% bootstrap interval over queries; "difference": student minus teacher on the same
    queries, with interval and p of a permutation test; "agreement": of what both find, without labels: the share of the k
    nearest, rank-biased overlap of the first k (mean over queries, intervals) and linear CKA of the embeddings;
    "geometry": of each, hubness at k, effective rank and its largest value, alignment and uniformity; "classes": name ->
    Recall@1 of both, the number of queries, "agreement" (overlap and rank-biased overlap of its queries, CKA of its images)
    and the "geometry" of its images (without hubness, which is of a whole gallery). None stands for what has no value.

    Raises ``UserError`` where the images differ or the gallery has fewer than k.
    """
    if not torch.equal(sides.student.indices, sides.teacher.indices):
        raise UserError("these are embeddings of other images; embed the same ones, in the same order.")
    ours, theirs = (_neighbours(side, sides, k) for side in (sides.student, sides.teacher))
    hits = {"student": hits_at_k(ours), "teacher": hits_at_k(theirs)}
    test = paired(hits["student"], hits["teacher"])
    shared = {
        "overlap": neighbour_overlap(ours, theirs, k),
        "rank_biased_overlap": rank_biased_overlap(ours, theirs, k=k),
    }
    agreement = {
        **{name: _plain(bootstrap(values)) for name, values in shared.items()},
        "cka": float(linear_cka(sides.student.vectors, sides.teacher.vectors)),
    }
    return {
        "images": len(sides.student.labels),
        "queries": len(ours.query_labels),
        "k": k,
        "recall@1": {name: _plain(bootstrap(values)) for name, values in hits.items()},
        "difference": {**_plain(test.difference), "p": test.p},
        "agreement": agreement,
        "geometry": {
            "student": {"hubness": hubness(ours, k), **_geometry(sides.student)},
            "teacher": {"hubness": hubness(theirs, k), **_geometry(sides.teacher)},
        },
        "classes": _classes(sides, hits | shared, ours.query_labels, class_names),
    }


def merge(reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Figure (of ``MERGED``) -> mean, low, high: several seeds of a student as one, by Student's t at 95%."""
    return {name: _plain(merged([_figure(report, name) for report in reports])) for name in MERGED}


def _figure(report: dict[str, Any], name: str) -> float:
    group, _, key = name.partition(".")
    value = report[group][key] if group == "agreement" else report[group]
    if group in ("recall@1", "geometry"):
        value = value["student"]
    if group == "geometry":
        value = value[key]
    value = value["mean"] if isinstance(value, dict) else value
    return math.nan if value is None else float(value)


def _neighbours(side: Embeddings, sides: Sides, k: int) -> Neighbours:
    return evaluate_retrieval(side, [1, k], query=sides.query, gallery=sides.gallery)[1]


def _geometry(side: Embeddings) -> dict[str, float | None]:
    count, width = side.vectors.shape
    rows = torch.linspace(0, count - 1, min(count, PAIRS_OF)).long()
    return {
        "effective_rank": effective_rank(side.vectors),
        "dimensions": width,
        "alignment": _number(alignment(side.vectors, side.labels)),
        "uniformity": uniformity(side.vectors[rows]) if count > 1 else None,
    }


def _classes(
    sides: Sides, values: Mapping[str, Tensor], labels: Tensor, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """values: name -> (Q,) of every query; labels: (Q,)."""
    means = {name: per_class(of, labels) for name, of in values.items()}
    counts = labels.bincount(minlength=len(names)).tolist()
    found = {}
    for label, recall in means["student"].items():
        rows = (sides.student.labels == label).nonzero().flatten()
        ours, theirs = (_rows_of(side, rows) for side in (sides.student, sides.teacher))
        found[names[label]] = {
            "student": recall,
            "teacher": means["teacher"][label],
            "queries": counts[label],
            "agreement": {
                **{name: means[name][label] for name in ("overlap", "rank_biased_overlap")},
                "cka": _number(float(linear_cka(ours.vectors, theirs.vectors))) if len(rows) > 1 else None,
            },
            "geometry": {"student": _geometry(ours), "teacher": _geometry(theirs)},
        }
    return found


def _rows_of(side: Embeddings, rows: Tensor) -> Embeddings:
    return Embeddings(side.vectors[rows], side.labels[rows], side.indices[rows])


def _plain(interval: Interval) -> dict[str, float | None]:
    return {name: _number(value) for name, value in interval._asdict().items()}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(value)
