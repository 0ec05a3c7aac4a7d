"""RunSummary: what a page knows about one trained network."""

from dataclasses import dataclass, field
from typing import Any

from metric_kd.errors import UserError

STYLES: dict[str, tuple[str, Any]] = {
    "teacher": ("#374151", (0, (5, 2))),
    "alone": ("#b45309", (0, (1, 1.2))),
    "distilled": ("#1d4ed8", "-"),
}
OTHER_STYLES: tuple[tuple[str, Any], ...] = (
    ("#7e22ce", (0, (3, 1, 1, 1))),
    ("#0f766e", (0, (6, 1))),
    ("#9d174d", (0, (2, 2))),
)
"""Colour and dashes of a line: either alone tells it from the others."""


@dataclass(frozen=True)
class RunSummary:
    """One network of a comparison.

    role: "teacher", "distilled", "alone" (the same student without a teacher), "control" (alone, with the compute that
    the teacher's forward cost) or any other word. recall: {K: fraction in 0..1}. seconds: training time. history: the
    records of metrics.jsonl, of which ``epoch``, ``loss`` and, where they are there, ``recall@K`` or ``val_recall@K``
    (fractions) are read. command: what repeats the run. note: a remark for the table.
    """

    title: str
    role: str
    parameters: int
    embedding_size: int
    recall: dict[int, float]
    seconds: float
    history: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.recall or any(not 0 <= value <= 1 for value in self.recall.values()):
            raise UserError(f"{self.title}: recall is a fraction from 0 to 1 for at least one K, not {self.recall}.")


def with_role(runs: list[RunSummary], role: str) -> RunSummary | None:
    """The first run of a role, or None."""
    return next((run for run in runs if run.role == role), None)


def common_ks(runs: list[RunSummary]) -> list[int]:
    """The K that every run knows, ascending."""
    return sorted(set.intersection(*(set(run.recall) for run in runs)))


def styles(runs: list[RunSummary]) -> list[tuple[str, Any]]:
    """(colour, dashes) of every run: fixed for the known roles' first run, the next free one for all others."""
    free, taken, chosen = list(OTHER_STYLES), set(), []
    for run in runs:
        if run.role in STYLES and run.role not in taken:
            taken.add(run.role)
            chosen.append(STYLES[run.role])
        else:
            chosen.append(free[0])
            free.append(free.pop(0))
    return chosen
