"""regression and csd: terms that bring the student into the teacher's coordinates."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from metric_kd.errors import UserError
from metric_kd.functional import csd, regression
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_regression_by_its_definition():
    student, teacher = rows(7, 5), rows(7, 5, 1)
    cosine = torch.nn.functional.cosine_similarity(student, teacher)
    torch.testing.assert_close(regression(student, teacher), (1 - cosine).mean())
    torch.testing.assert_close(regression(3 * student, teacher), (1 - cosine).mean())
    squared = sum((a - b).square().sum() for a, b in zip(student, teacher, strict=True)) / 7
    torch.testing.assert_close(regression(student, teacher, "euclidean"), squared)


def csd_by_loops(student, teacher, gallery, k, ts, tt):
    total = 0.0
    unit = nn.functional.normalize
    for s, t in zip(unit(student), unit(teacher), strict=True):
        likeness = [(float(t @ g), float(s @ g)) for g in unit(gallery)]
        likeness = sorted(likeness, reverse=True)[:k]
        near, seen = (torch.tensor(column, dtype=torch.float64) for column in zip(*likeness, strict=True))
        p, q = (near / tt).softmax(0), (seen / ts).softmax(0)
        total += float((p * (p / q).log()).sum())
    return total / len(student)


@pytest.mark.parametrize("k", [3, 6, 100])
@pytest.mark.parametrize("gallery", [None, 11])
def test_csd_by_loops(k, gallery):
    student, teacher = rows(6, 4), rows(6, 4, 1)
    others = teacher if gallery is None else rows(gallery, 4, 2)
    value = csd(student, teacher, None if gallery is None else others, k, 0.5, 0.2)
    assert float(value) == pytest.approx(csd_by_loops(student, teacher, others, k, 0.5, 0.2), rel=1e-10)


def test_csd_is_zero_where_the_student_is_the_teacher():
    teacher = rows(6, 4)
    assert float(csd(2 * teacher, teacher, None, 4, 0.1, 0.1)) == pytest.approx(0, abs=1e-12)
    assert float(csd(teacher @ torch.linalg.qr(rows(4, 4, 3)).Q, teacher, None, 4, 0.1, 0.1)) > 0.1  # turned away


@pytest.mark.parametrize(
    "loss", [regression, lambda s, t: regression(s, t, "euclidean"), lambda s, t: csd(s, t, None, 3, 0.5, 0.3)]
)
def test_gradients(loss):
    teacher = rows(5, 4, 1).requires_grad_()
    assert gradcheck(lambda s: loss(s, teacher), rows(5, 4).requires_grad_())
    loss(rows(5, 4).requires_grad_(), teacher).backward()
    assert teacher.grad is None


def test_safe_where_there_is_no_direction():
    for loss in (regression, csd):
        student = torch.zeros(3, 4, requires_grad=True)
        value = loss(student, rows(3, 4, dtype=torch.float32))
        value.backward()
        assert torch.isfinite(value) and torch.equal(student.grad, torch.zeros(3, 4))
        assert float(loss(student[:0], torch.zeros(0, 4))) == 0


def outputs(ours, theirs, n=5):
    return Output(embedding=rows(n, ours, dtype=torch.float32)), Output(embedding=rows(n, theirs, 1, torch.float32))


BATCH = Batch(torch.zeros(5, 3, 1, 1), torch.zeros(5), torch.zeros(5))


def test_the_map_is_trained_where_widths_differ():
    student, teacher = outputs(3, 4)
    term = TERMS["regression"]()
    term.build(student, teacher, 0)
    assert sum(p.numel() for p in term.parameters()) == 3 * 4 + 4
    term(student, teacher, BATCH).backward()
    assert term.map.weight.grad.abs().sum() > 0
    same = TERMS["regression"]()
    same.build(*outputs(4, 4), 0)
    assert not list(same.parameters())
    assert same.anchors and not term.anchors, "a trained map leaves the student in a space of its own"
    assert same(*outputs(4, 4), BATCH) == regression(*(o.embedding for o in outputs(4, 4)))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: TERMS["regression"](map="identity").build(*outputs(3, 4), 0), "--embedding_size 4"),
        (lambda: TERMS["csd"]().build(*outputs(3, 4), 0), "--embedding_size 4"),
        (lambda: TERMS["regression"](map="cubic"), "unknown map"),
        (lambda: TERMS["regression"](distance="manhattan"), "unknown distance"),
        (lambda: regression(rows(3, 4), rows(3, 4), "manhattan"), "unknown distance"),
        (lambda: regression(rows(3, 4), rows(2, 4)), "of one shape"),
        (lambda: TERMS["csd"](neighbours=0), "neighbours >= 1"),
        (lambda: csd(rows(3, 4), rows(3, 4), None, 3, 0.0, 0.1), "above 0"),
        (lambda: csd(rows(3, 4), rows(2, 4)), "csd compares"),
        (
            lambda: csd(rows(3, 4), rows(2, 4)),
            "3 embeddings of the student and 2 of the teacher: give those of the same",
        ),
        (lambda: csd(rows(3, 5), rows(3, 4)), "give the student --embedding_size 4"),
        (lambda: csd(rows(3, 4), rows(3, 4), rows(9, 5)), "a gallery of shape .9, 5.: give one"),
    ],
)
def test_wrong_arguments(act, words):
    with pytest.raises(UserError, match=words):
        act()
