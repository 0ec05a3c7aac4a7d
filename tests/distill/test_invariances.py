"""The invariances that each method claims, of its pure function: what may be done to one network's features, or to both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as draws
from method_cases import CASES, drawn, halves, pair

few = settings(derandomize=True, deadline=None, max_examples=20)
seeds = draws.integers(0, 2**31)


def factors(seed, *shape):
    return drawn(seed, *shape).clamp(-2, 2).exp()


def orthogonal(seed, size):
    return torch.linalg.qr(drawn(seed, size, size))[0]


def turned(x, seed):
    return (x.flatten(1) @ orthogonal(seed, x[0].numel())).view_as(x)


def moved(x, seed):
    return x + 10 * drawn(seed, *x.shape[1:])


def scaled(x, seed):
    return x * factors(seed, 1)


def each_scaled(x, seed):
    return x * factors(seed, len(x), *[1] * (x.ndim - 1))


def each_shifted(x, seed):
    return x + 10 * drawn(seed, len(x), *[1] * (x.ndim - 1))


def channels_scaled(x, seed):
    return x * factors(seed, *x.shape[:2], 1, 1)


def channels_permuted(x, seed):
    return x[:, drawn(seed, x.shape[1]).argsort()]


def channels_flipped(x, seed):
    return x * drawn(seed, x.shape[1], 1, 1).sign()


def positions_turned(x, seed):
    return (x.flatten(2) @ orthogonal(seed, x[0, 0].numel())).view_as(x)


def positions_permuted(x, seed):
    return x.flatten(2)[:, :, drawn(seed, x[0, 0].numel()).argsort()].view_as(x)


def elements_scaled(x, seed):
    return x * factors(seed, *x.shape)


def both(transformation):
    """The same of both halves."""
    return lambda x, seed: torch.cat([transformation(half, seed) for half in halves(x)], 1)


def unequal(x, seed):
    """The first half by a factor, the second by its inverse."""
    first, second = halves(x)
    return torch.cat([first * factors(seed, 1), second / factors(seed, 1)], 1)


EITHER = {
    "afd": (channels_scaled,),
    "at": (channels_permuted, channels_flipped, scaled, each_scaled),
    "bss": (each_shifted,),
    "cc": (turned, each_scaled),
    "dark_rank": (turned, moved),
    "dml": (each_shifted,),
    "fsp": (positions_turned, unequal),
    "ft": (each_scaled,),
    "irg_edge": (turned, moved, scaled),
    "irg_transformation": (both(turned), both(moved), scaled),
    "kdsvd": (positions_turned, each_scaled),
    "lwm": (each_scaled,),
    "nst": (channels_permuted, channels_scaled),
    "nst of few positions": (channels_permuted, channels_scaled),
    "pkt": (turned, each_scaled),
    "rkd_angle": (turned, moved, scaled),
    "rkd_distance": (turned, moved, scaled),
    "sobolev": (each_scaled,),
    "sp": (turned, scaled),
    "st": (each_shifted,),
}
"""What may be done to the student alone, and to the teacher alone."""

TEACHER = {"ab": (elements_scaled,), "dark_rank": (scaled,)}
"""What may be done to the teacher alone."""

TOGETHER = {
    "ab": (channels_permuted, positions_permuted),
    "afd": (positions_turned,),
    "at": (positions_permuted,),
    "fitnet": (moved, turned),
    "ft": (channels_permuted, positions_permuted),
    "imitate": (moved, turned),
    "irg_vertex": (moved, turned),
    "logits": (moved, turned),
    "nst": (positions_turned,),
    "nst of few positions": (positions_turned,),
    "ofd": (channels_permuted, positions_permuted),
    "sobolev": (turned,),
    "vid": (moved, positions_turned),
}
"""What may be done to both at once."""

NEITHER = {
    "ab": (elements_scaled,),
    "at": (moved,),
    "cc": (moved,),
    "dark_rank": (scaled,),
    "fitnet": (scaled,),
    "fsp": (scaled,),
    "imitate": (each_shifted,),
    "logits": (each_shifted,),
    "irg_edge": (each_scaled,),
    "pkt": (moved,),
    "rkd_distance": (each_scaled,),
    "sp": (moved, each_scaled),
    "st": (scaled,),
}
"""What changes the loss when it is done to the student: the tests above can fail."""

DEGREES = {"fitnet": 2, "fsp": 4, "imitate": 2, "irg_vertex": 2, "logits": 2, "ofd": 2}
"""loss(a s, a t) = a^degree loss(s, t) for a > 0."""

GUARDED = ("afd", "at", "pkt")
"""They add 1e-6 to a length by which they divide, which is not quite invariant."""


def each(table):
    """A test per method and transformation."""
    pairs = [(name, transformation) for name, several in table.items() for transformation in several]
    return pytest.mark.parametrize("name, transformation", pairs, ids=[f"{n}-{t.__name__}" for n, t in pairs])


def assert_same(name, one, other):
    tolerance = 1e-4 if name in GUARDED else 1e-9
    torch.testing.assert_close(CASES[name].loss(*one), CASES[name].loss(*other), rtol=tolerance, atol=1e-12)


@each(EITHER)
@few
@given(seed=seeds)
def test_of_either_network(name, transformation, seed):
    student, teacher = pair(name, seed)
    assert_same(name, (transformation(student, seed + 2), teacher), (student, teacher))
    assert_same(name, (student, transformation(teacher, seed + 2)), (student, teacher))


@each(TEACHER)
@few
@given(seed=seeds)
def test_of_the_teacher(name, transformation, seed):
    student, teacher = pair(name, seed)
    assert_same(name, (student, transformation(teacher, seed + 2)), (student, teacher))


@each(TOGETHER)
@few
@given(seed=seeds)
def test_of_both_networks(name, transformation, seed):
    student = pair(name, seed)[0]
    teacher = drawn(seed + 1, *student.shape)
    assert_same(name, (transformation(student, seed + 2), transformation(teacher, seed + 2)), (student, teacher))


@pytest.mark.parametrize("name", DEGREES)
@few
@given(seed=seeds, scale=draws.floats(0.01, 100))
def test_homogeneous(name, seed, scale):
    student, teacher = pair(name, seed)
    loss = CASES[name].loss
    torch.testing.assert_close(loss(scale * student, scale * teacher), scale ** DEGREES[name] * loss(student, teacher))


@each(NEITHER)
def test_what_counts(name, transformation):
    student, teacher = pair(name, 0)
    with pytest.raises(AssertionError):
        assert_same(name, (transformation(student, 2), teacher), (student, teacher))
