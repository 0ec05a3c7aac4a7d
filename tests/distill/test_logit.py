import math

import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck

from metric_kd.errors import UserError
from metric_kd.functional import cross_entropy, dml, logits, st
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

LOSSES = {"logits": logits, "st": st, "dml": dml}
BATCH = Batch(torch.zeros(4, 3, 1, 1, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), torch.arange(4))


def scores(n, k, dtype=torch.float64, seed=0):
    return 3 * torch.randn(n, k, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(loss, student, teacher, **options):
    x = student.clone().requires_grad_()
    value = loss(x, teacher, **options)
    value.backward()
    return value.detach(), x.grad


def softmax(row, temperature):
    exponentials = [math.exp(score / temperature) for score in row]
    return [e / sum(exponentials) for e in exponentials]


def divergence(student, teacher, temperature):
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        for q, p in zip(softmax(ours, temperature), softmax(theirs, temperature), strict=True):
            total += p * math.log(p / q)
    return torch.tensor(total / len(student), dtype=torch.float64)


GOLDEN = {
    "zoo_logits": (logits, {}),
    "zoo_st_T1": (st, {"temperature": 1.0}),
    "zoo_st_T4": (st, {}),
    "rep_kd_T4": (st, {"temperature": 4.0}),
    "zoo_dml_net1": (dml, {}),
    "zoo_dml_net2": (dml, {}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    pinned, (loss, options) = case(name, family="zoo"), GOLDEN[name]
    value, gradient = run(loss, pinned.inputs["out_s"], pinned.inputs["out_t"], **options)
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, pinned.outputs["grad_out_s"])


def test_golden_of_the_seed():
    pinned = arrays("zoo_kd")
    value, gradient = run(st, pinned["in_fs"], pinned["ft"])
    assert_close(value, pinned["loss"])
    assert_close(gradient, pinned["grad_fs"])


def test_cross_entropy_golden():
    pinned = case("ce", family="zoo")
    value, gradient = run(cross_entropy, pinned.inputs["out_s"], pinned.inputs["target"])
    assert_close(value, pinned.outputs["loss"])
    assert_close(gradient, pinned.outputs["grad_out_s"])


@pytest.mark.parametrize("n", [1, 3])
def test_oracles(n):
    student, teacher = scores(n, 5), scores(n, 5, seed=1)
    gaps = [(s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)]
    assert_close(logits(student, teacher), torch.tensor(sum(gaps) / len(gaps), dtype=torch.float64))
    assert_close(dml(student, teacher), divergence(student, teacher, 1.0))
    assert_close(st(student, teacher), 16 * divergence(student, teacher, 4.0))
    assert_close(st(student, teacher, 2.5), 2.5**2 * divergence(student, teacher, 2.5))


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_the_teacher_as_student(name):
    student, teacher = scores(3, 4).requires_grad_(), scores(3, 4, seed=1).requires_grad_()
    assert gradcheck(lambda s: LOSSES[name](s, teacher), student)
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    value, gradient = run(LOSSES[name], teacher.detach(), teacher)
    assert value.abs() < 1e-15 and gradient.abs().max() < 1e-15


@pytest.mark.parametrize("name", ["st", "dml"])
def test_divergences_see_logits_up_to_a_constant_per_image(name):
    student, teacher = scores(3, 4), scores(3, 4, seed=1)
    moved = student + torch.tensor([[5.0], [-2.0], [30.0]])
    assert_close(LOSSES[name](moved, teacher - 7), LOSSES[name](student, teacher), 1e-10)


def test_a_high_temperature_becomes_the_gap_of_centred_logits():
    student, teacher = scores(4, 5), scores(4, 5, seed=1)
    gap = student - teacher
    limit = (gap - gap.mean(1, keepdim=True)).square().mean() / 2
    assert_close(st(student, teacher, 1e4), limit, 1e-2)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits_are_finite(name, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0]] * 2, dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], dtype=dtype)
    value, gradient = run(LOSSES[name], student, teacher)
    assert value.dtype == torch.float32 and value.isfinite() and value > 0
    assert gradient.dtype == dtype and gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_terms(name):
    student, teacher = scores(4, 5, torch.float32), scores(4, 5, torch.float32, seed=1)
    term = TERMS[name]()
    assert term.reads_teacher and term.family == "logit" and term.needs == ("logits",) and term.paper
    assert term.default_weight == {"logits": 0.1, "st": 0.1, "dml": 1.0}[name]
    term.build(Output(logits=student), Output(logits=teacher), 5)
    expected = LOSSES[name](student, teacher)
    assert torch.equal(term(Output(logits=student), Output(logits=teacher), BATCH), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(term(Output(logits=student), Output(logits=teacher), BATCH), expected)
    assert term(Output(logits=student.bfloat16()), Output(logits=teacher), BATCH).dtype == torch.float32


def test_temperature_is_an_option():
    student, teacher = scores(4, 5), scores(4, 5, seed=1)
    value = TERMS["st"](temperature=2.0)(Output(logits=student), Output(logits=teacher), BATCH)
    assert torch.equal(value, st(student, teacher, 2.0)) and not torch.equal(value, st(student, teacher))


def test_bad_input():
    for name, loss in LOSSES.items():
        with pytest.raises(UserError, match="same classes"):
            loss(scores(4, 5), scores(4, 6))
        with pytest.raises(UserError, match="same classes"):
            TERMS[name]().build(Output(logits=scores(4, 5)), Output(logits=scores(4, 6)), 5)
        with pytest.raises(UserError, match="the student gives no logits"):
            TERMS[name]().build(Output(), Output(logits=scores(4, 6)), 5)
        with pytest.raises(UserError, match="the teacher gives no logits"):
            TERMS[name]().build(Output(logits=scores(4, 6)), Output(), 5)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="temperature above 0"):
            TERMS["st"](temperature=temperature)
        with pytest.raises(UserError, match="temperature above 0"):
            st(scores(4, 5), scores(4, 5), temperature)
