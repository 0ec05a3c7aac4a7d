"""What holds for every method's pure function: safe numerics, one precision, its zero, its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draws
from method_cases import CASES, N, pair, run
from torch.autograd import gradcheck

import metric_kd.functional as KD

few = settings(derandomize=True, deadline=None, max_examples=20)
seeds = draws.integers(0, 2**31)
counts = draws.sampled_from([1, 2, N])
every = pytest.mark.parametrize("name", CASES)


def test_every_pure_function_of_a_method_has_a_case():
    of_methods = {n for n in KD.__all__ if getattr(KD, n).__module__.startswith("metric_kd.distill.")}
    assert {name.split()[0] for name in CASES} == of_methods - {"bn_margin", "ofd_margin", "stable_logits"}


def assert_bounded(student, value, gradient, smallest=0.0):
    """|gradient| |student| <= 100 (1 + |loss|).

    A change of the student by its own size should change the loss by about its own size: for a loss that is homogeneous
    of degree d the product is at least d times the loss, and here none is above 12 (1 + loss). Where a vanished length
    divides, it is 2e3 (a channel in a mean) to 1e11. ``smallest`` stands for |student| where that is less.
    """
    assert value.isfinite() and gradient.isfinite().all()
    size = max(student.double().norm().item(), smallest)
    assert gradient.double().norm().item() * size <= 100 * (1 + abs(value.item()))


@every
@few
@given(seed=seeds, n=counts, ours=draws.floats(-4, 4), theirs=draws.floats(-4, 4), single=draws.booleans())
def test_safe_at_every_scale(name, seed, n, ours, theirs, single):
    student, teacher = pair(name, seed, n)
    student, teacher = student * 10**ours, teacher * 10**theirs
    if single:
        student, teacher = student.float(), teacher.float()
    assert_bounded(student, *run(name, student, teacher))


def dead_channels(x):
    x[:, :2] = 0


def zero_rows(x):
    x[:2] = 0


def faint_rows(x):
    x[: len(x) // 2] *= 1e-10


def all_zero(x):
    x.zero_()


def duplicates(x):
    x[: len(x) // 2 + 1] = x[:1].clone()


def all_alike(x):
    x[:] = x[:1].clone()


def nearly_alike(x):
    x[1:] = x[:1] + 1e-9 * x[1:]


def opposite(x):
    x[-1] = -x[0]


def flat(x):
    x[:] = x.flatten(1)[:, 0].reshape(-1, *[1] * (x.ndim - 1))


def sure(x):
    """Logits, or other rows, with one entry of 1e4 beside zeros."""
    if x.ndim == 2:
        x[:] = 1e4 * (x == x.amax(1, keepdim=True))


HAZARDS = (dead_channels, zero_rows, faint_rows, all_zero, duplicates, all_alike, nearly_alike, opposite, flat, sure)


@every
@few
@given(seed=seeds, n=counts, where=draws.sampled_from(["student", "teacher", "both"]), single=draws.booleans())
def test_safe_in_hazards(name, seed, n, where, single):
    for hazard in HAZARDS:
        student, teacher = (x.float() if single else x for x in pair(name, seed, n))
        for owner, x in (("student", student), ("teacher", teacher)):
            if where in (owner, "both"):
                hazard(x)
        assert_bounded(student, *run(name, student, teacher), smallest=1.0)


@pytest.mark.parametrize(
    "name", ["cc", "dark_rank", "irg_edge", "irg_transformation", "pkt", "rkd_angle", "rkd_distance", "sp"]
)
def test_one_image_has_no_relations(name):
    value, gradient = run(name, *pair(name, 0, 1))
    assert value == 0 and not gradient.any()


@every
@few
@given(seed=seeds, scale=draws.floats(-1, 1), half=draws.sampled_from([torch.float16, torch.bfloat16]))
def test_half_types_are_computed_in_float32(name, seed, scale, half):
    student, teacher = ((x * 10**scale).to(half) for x in pair(name, seed))
    expected, slope = run(name, student.float(), teacher.float())
    value, gradient = run(name, student, teacher)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert gradient.dtype == half and gradient.isfinite().all()
    torch.testing.assert_close(gradient, slope.to(half))
    torch.testing.assert_close(run(name, student, teacher.float())[0], expected)


@every
@few
@given(seed=seeds, scale=draws.floats(-1, 2), half=draws.booleans())
def test_autocast_does_not_reach_in(name, seed, scale, half):
    student, teacher = (10**scale * x.to(torch.bfloat16 if half else torch.float32) for x in pair(name, seed))
    expected, slope = run(name, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = student.clone().requires_grad_()
        value = CASES[name].loss(leaf, teacher)
    value.backward()
    assert torch.equal(value, expected) and torch.equal(leaf.grad, slope)


NOT_ZERO = {
    "ab": "a margin is asked for beyond the teacher's side of zero",
    "crd": "a likelihood among memories",
    "csd": "the student's temperature is another than the teacher's",
    "dark_rank": "a likelihood of one order",
    "vid": "a likelihood, with a variance",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ZERO])
@few
@given(seed=seeds, n=counts, scale=draws.floats(-4, 4))
def test_zero_where_the_student_is_the_teacher_and_only_there(name, seed, n, scale):
    student = 10**scale * pair(name, seed, n)[0]
    value, gradient = run(name, student, student.clone())
    size = max(1, student.abs().max().item() ** 4)  # no loss grows faster
    assert abs(value.item()) <= 1e-10 * size
    assert gradient.norm() * student.norm() <= 1e-5 * size  # pkt's eps of 1e-6 is not quite without a gradient
    if n == N:
        assert run(name, *pair(name, seed))[0] > 1e-4


@pytest.mark.parametrize("name", NOT_ZERO)
def test_not_zero_where_the_student_is_the_teacher(name):
    student, _ = pair(name, 0)
    assert run(name, student, student.clone())[0].abs() > 1e-2


@every
def test_gradient(name):
    student, teacher = pair(name, 3)
    assert gradcheck(lambda x: CASES[name].loss(x, teacher), student.requires_grad_())


@every
def test_no_gradient_reaches_the_teacher(name):
    student, teacher = (x.requires_grad_() for x in pair(name, 4))
    CASES[name].loss(student, teacher).backward()
    assert student.grad.norm() > 0
    # Of CRD the teacher's side is a trained layer; the term detaches what enters that (test_any_pair).
    assert (teacher.grad is None) != (name == "crd")
