import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from metric_kd.errors import UserError
from metric_kd.evaluation.compatibility import PAIRS, chance, compatibility, verdict
from metric_kd.evaluation.embed import Embeddings


def two(n=40, d=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 8
    centres = torch.randn(8, d, generator=draw)
    teacher = normalize(centres[labels] + 0.7 * torch.randn(n, d, generator=draw))
    student = 3 * (teacher + 0.4 * torch.randn(n, d, generator=draw))
    rows = torch.randperm(n, generator=draw)
    return Embeddings(student, labels, rows), Embeddings(teacher, labels, rows)


def by_hand(asks, holds, labels, asked, offered):
    hits = []
    for q in asked:
        gaps = [(float((asks[q] - holds[g]).norm()), labels[g] == labels[q]) for g in offered if g != q]
        hits.append(bool(min(gaps, key=lambda pair: pair[0])[1]))
    return sum(hits) / len(hits)


def test_every_pair_by_hand():
    student, teacher = two()
    found = compatibility(student, teacher, [1], unit=True)
    spaces = {
        "student-student": (student.vectors, student.vectors),
        "student-teacher": (normalize(student.vectors), teacher.vectors),
        "teacher-student": (teacher.vectors, normalize(student.vectors)),
        "teacher-teacher": (teacher.vectors, teacher.vectors),
    }
    assert list(found) == list(PAIRS) == list(spaces)
    for pair, (asks, holds) in spaces.items():
        assert found[pair]["recall@1"] == by_hand(asks, holds, student.labels, range(40), range(40))
        assert 0 < found[pair]["map@r"] <= 1


def test_query_and_gallery_sets_are_those_of_the_data_set():
    student, teacher = two()
    query = np.zeros(40, bool)
    query[::3] = True
    found = compatibility(student, teacher, [1], query=query, gallery=~query, metrics=[])
    asked, offered = ([k for k in range(40) if query[student.indices[k]] == want] for want in (True, False))
    expected = by_hand(student.vectors, teacher.vectors, student.labels, asked, offered)
    assert found["student-teacher"] == {"recall@1": expected}


def test_a_bridge_is_crossed_where_the_two_meet_and_nowhere_else():
    student, teacher = two()
    wide = student._replace(vectors=torch.cat([student.vectors, torch.zeros(40, 2)], 1))
    found = compatibility(wide, teacher, [1], bridge=lambda x: x[:, :6])
    assert found == compatibility(student, teacher, [1])
    with pytest.raises(UserError, match="8 numbers and the teacher's 6"):
        compatibility(wide, teacher, [1])


def test_other_images_are_refused():
    student, teacher = two()
    with pytest.raises(UserError, match="embed the same ones"):
        compatibility(student, teacher._replace(indices=teacher.indices.flip(0)), [1])


@pytest.mark.parametrize(
    ("own", "across", "word"), [(0.4, 0.39, "Yes, the"), (0.4, 0.3, "Yes, at"), (0.4, 0.2, "No,"), (0, 0, "No,")]
)
def test_the_sentence(own, across, word):
    figures = dict(zip(PAIRS, ({"recall@1": value} for value in (own, across, 0.1, 0.5)), strict=True))
    assert verdict(figures).startswith(word) and "the teacher in its own: 50.0" in verdict(figures)
    assert verdict(figures, chance=0.2).startswith(word if own else "Neither")
    assert verdict(figures, chance=0.39).startswith("Neither yes nor no")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_chance_is_what_a_random_order_finds(split, k):
    labels = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])
    query, gallery = (np.arange(10) % 2 == 0, np.arange(10) % 3 > 0) if split else (None, None)
    asks = np.arange(10) if query is None else np.flatnonzero(query)
    holds = np.arange(10) if gallery is None else np.flatnonzero(gallery)
    draw, hits = np.random.default_rng(0), []
    for _ in range(4000):
        for q in asks:
            order = draw.permutation(holds[holds != q])[:k]
            hits.append((labels[order] == labels[q]).any())
    assert chance(labels, k, query, gallery) == pytest.approx(np.mean(hits), abs=0.01)
