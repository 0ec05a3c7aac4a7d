"""A small comparison that the tests of the report share."""

import pytest
import torch

from metric_kd.evaluation.search import find_neighbours
from metric_kd.report.runs import RunSummary


def line(values):
    """Embeddings on a line."""
    return torch.tensor(values).float()[:, None]


@pytest.fixture
def labels():
    return torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.fixture
def networks(labels):
    """Of six queries: 0 and 1 are fixed by distillation, 5 is broken, 2 and 3 are right, 4 is wrong with both."""
    positions = {
        "Alone": [1.5, 5.0, 1.0, 1.1, 5.2, 5.5],
        "Distilled": [0, 0.1, 5, 5.1, 5.3, -1],
    }
    found = {name: find_neighbours(line(p), k=3, query_labels=labels) for name, p in positions.items()}
    first = {name: (labels[n.indices[:, 0]] == labels).tolist() for name, n in found.items()}
    assert first["Alone"] == [False, False, True, True, False, True]
    assert first["Distilled"] == [True, True, True, True, False, False]
    return found


def history(final, epochs=4):
    """Two losses fall; Recall@1 is measured in every second epoch."""
    return [
        {
            "epoch": e,
            "loss": 1 / e,
            "losses": {"triplet": 1 / e},
            "lr": 0.1,
            "seconds": 1.0,
            **({"recall@1": final * e / epochs} if e % 2 == 0 else {}),
        }
        for e in range(1, epochs + 1)
    ]


@pytest.fixture
def runs():
    def make(title, role, parameters, size, first, **more):
        return RunSummary(title, role, parameters, size, {1: first, 4: first + 0.1}, 92.4, history(first), **more)

    return [
        make("Big teacher", "teacher", 1_600_000, 128, 0.847, command="python run.py --epochs 3 --out <dir>"),
        make("Student alone", "alone", 100_000, 16, 0.721, command="python run.py"),
        make("Distilled student", "distilled", 100_000, 16, 0.765, command="python run_distill.py"),
    ]
