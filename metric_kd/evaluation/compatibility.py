"""Compatibility: can the student query the teacher's gallery, or must the gallery be indexed again?"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from metric_kd.distances import unit_rows
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.retrieval import evaluate_retrieval

STUDENT, TEACHER = "student", "teacher"
PAIRS = tuple(f"{query}-{gallery}" for query in (STUDENT, TEACHER) for gallery in (STUDENT, TEACHER))
"""Whose embeddings the queries have, and whose the gallery has."""

FULL, MOST = 0.95, 0.75
"""Shares of what the student finds in a gallery of its own, from which on the teacher's gallery serves as well, or does."""

NEAR_CHANCE = 0.02
"""Of the way from chance to 1, how much a student must have gone for its shares to say anything."""

Matrix = dict[str, dict[str, float]]


def compatibility(
    student: Embeddings,
    teacher: Embeddings,
    ks: Sequence[int] = (1,),
    *,
    bridge: Callable[[Tensor], Tensor] | None = None,
    unit: bool = False,
    query: np.ndarray | Tensor | None = None,
    gallery: np.ndarray | Tensor | None = None,
    metrics: Sequence[str] = ("map@r",),
) -> Matrix:
    """{"student-teacher": {"recall@1": fraction, ...}, ...}: what queries of one network find in a gallery of another.

    student, teacher: embeddings of the same images, in the same order. A pair of one network is measured as
    :func:`~metric_kd.evaluation.retrieval.evaluate_retrieval` measures it alone; where the two meet, the student is
    brought into the teacher's space first: by ``bridge`` if there is one, then with ``unit`` to length 1, as the teacher's
    embeddings are. An image never finds itself, through another network either. query, gallery, metrics: as there.

    Raises ``UserError`` where the widths differ and no bridge closes the gap, or the images differ.
    """
    ours = student.vectors if bridge is None else bridge(student.vectors)
    check_widths(ours.shape[1], teacher.vectors.shape[1])
    moved = student._replace(vectors=unit_rows(ours) if unit else ours)
    pairs = ((student, student), (moved, teacher), (teacher, moved), (teacher, teacher))
    return {
        name: evaluate_retrieval(
            asks, ks, query=query, gallery=gallery, metrics=metrics, offered_by=None if asks is holds else holds
        )[0]
        for name, (asks, holds) in zip(PAIRS, pairs, strict=True)
    }


def check_widths(student: int, teacher: int) -> None:
    """Raise ``UserError`` where embeddings of these lengths cannot be compared."""
    if student != teacher:
        raise UserError(
            f"the student's embeddings have {student} numbers and the teacher's {teacher}; fit a bridge between them "
            "(--bridge ridge)."
        )


def chance(labels: np.ndarray, k: int = 1, query: np.ndarray | None = None, gallery: np.ndarray | None = None) -> float:
    """Recall@k of a network that knows nothing: the mean over queries of 1 - prod_{i<k} (G - n - i) / (G - i).

    labels: (N,) of all images; query, gallery: (N,) bool, None for all. Of G images in a query's gallery, itself left out, n
    are of its class.
    """
    asks, holds = (np.ones(len(labels), bool) if side is None else np.asarray(side, bool) for side in (query, gallery))
    _, place = np.unique(labels, return_inverse=True)
    right = np.bincount(place, holds)[place][asks] - holds[asks]
    held = int(holds.sum()) - holds[asks].astype(int)
    missed = np.ones(len(right))
    for i in range(k):
        missed *= np.clip(held - right - i, 0, None) / np.clip(held - i, 1, None)
    return float((1 - missed).mean())


def verdict(
    matrix: Mapping[str, Mapping[str, float]],
    key: str = "recall@1",
    title: str = "Recall@1",
    chance: float | None = None,
) -> str:
    """One sentence: can the student be deployed without indexing the gallery again?

    chance: what a network that knows nothing reaches (:func:`chance`); of a student near it nothing is concluded.
    """
    own, across, best = (100 * matrix[pair][key] for pair in (PAIRS[0], PAIRS[1], PAIRS[3]))
    figures = (
        f"{title} {across:.1f} in the teacher's gallery, {own:.1f} in a gallery of its own (the teacher in its own: "
        f"{best:.1f})"
    )
    if chance is not None and own / 100 < chance + NEAR_CHANCE * (1 - chance):
        return f"Neither yes nor no: the student finds hardly more than chance, {100 * chance:.1f}; train it further: {figures}."
    if own > 0 and across >= FULL * own:
        return f"Yes, the student can query the teacher's gallery as it is, without indexing it again: {figures}."
    if own > 0 and across >= MOST * own:
        return f"Yes, at a price: the student can query the teacher's gallery, but a new index finds more: {figures}."
    return f"No, index the gallery again with the student: {figures}."
