import itertools
import math

import pytest
import torch
from largest import LargestTensor
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck
from torch.nn.functional import adaptive_avg_pool2d

from metric_kd.distill.feature import kdsvd as kdsvd_module
from metric_kd.errors import UserError
from metric_kd.functional import at, fitnet, kdsvd, nst
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))


def maps(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(widths, sizes, seed=0):
    return Output(
        maps=tuple(
            maps(2, c, s, s, dtype=torch.float32, seed=seed + i).relu()
            for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
        )
    )


STUDENT = network((4, 4, 6, 8), (8, 8, 4, 2))
TEACHER = network((8, 8, 12, 16, 20), (16, 8, 8, 4, 2), seed=9)
SAME = network((4, 6, 12, 16, 8), (16, 8, 8, 4, 2), seed=9)


def run(loss, student, *teacher):
    x = student.clone().requires_grad_()
    value = loss(x, *teacher)
    value.backward()
    return value.detach(), x.grad


def slow_nst(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = ([(c / c.norm()).flatten() for c in image] for image in (s, t))

        def kernel(a, b):
            return sum((x @ y) ** 2 for x in a for y in b) / (len(a) * len(b))

        total = total + kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    return total / len(student)


@pytest.mark.parametrize("name", ["zoo_nst", "rep_nst", "rep_nst_pool"])
def test_nst_golden(name):
    pinned = case(name, family="zoo")
    value, gradient = run(nst, *pinned.inputs.values())
    assert_close(value, pinned.outputs["loss"])
    if "grad_fm_s" in pinned.outputs:
        assert_close(gradient, pinned.outputs["grad_fm_s"])
    else:
        assert gradient.abs().sum().item() == pytest.approx(*pinned.outputs["grad_abs_sum"].values(), rel=1e-9)


def test_at_golden_of_repdistiller():
    pinned = case("rep_at_p2", family="zoo")  # clamps the norm at 1e-12 where ours adds eps: a tiny eps is the same
    value, gradient = run(lambda s, t: at(s, t, 2, eps=1e-12), *pinned.inputs.values())
    assert_close(value, pinned.outputs["loss"])
    assert gradient.abs().sum().item() == pytest.approx(*pinned.outputs["grad_abs_sum"].values(), rel=1e-9)


@pytest.mark.parametrize(
    "name, loss", [("zoo_nst", nst), ("zoo_hint", fitnet), ("zoo_at", lambda s, t: at(s, t, 2, eps=1e-12))]
)
def test_golden_of_the_seeds_summed_over_stages(name, loss):
    pinned = arrays(name)
    stages = [key.removeprefix("in_s") for key in pinned if key.startswith("in_")]
    student = {i: pinned[f"in_s{i}"].requires_grad_() for i in stages}
    total = sum(loss(student[i], pinned[f"t{i}"]) for i in stages)
    total.backward()
    assert_close(total, pinned["loss"])
    for i in stages:
        assert_close(student[i].grad, pinned[f"grad_s{i}"])


SHAPES = {
    "few channels": ((3, 3, 3), (2, 3, 3)),
    "few positions": ((6, 2, 2), (7, 2, 2)),
    "mixed": ((2, 2, 2), (5, 2, 2)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_nst_oracle(shapes):
    student, teacher = maps(2, *shapes[0]), maps(2, *shapes[1], seed=1)
    expected, expected_gradient = run(slow_nst, student, teacher)
    value, gradient = run(nst, student, teacher)
    assert_close(value, expected)
    assert_close(gradient, expected_gradient)
    assert gradcheck(lambda s: nst(s, teacher), student.requires_grad_())
    assert run(nst, teacher, teacher)[0].abs() < 1e-15


@pytest.mark.parametrize("size", [3, 6, 8])
def test_nst_pools_the_larger_map(size):
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, size, size, seed=1)
    grid = min(size, 4)
    expected = slow_nst(adaptive_avg_pool2d(student, grid), adaptive_avg_pool2d(teacher, grid))
    assert_close(nst(student, teacher), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [3, 9])
def test_nst_dead_channels_and_large_values(dtype, channels):
    student, teacher = maps(2, channels, 2, 2), maps(2, 5, 2, 2, seed=1)
    student[0, 1] = 0
    student[1] = 0
    value, gradient = run(nst, (300 * student).to(dtype), (300 * teacher).to(dtype))
    assert value.isfinite() and gradient.isfinite().all() and 0 < gradient.abs().max() < 1
    assert (gradient[0, 1] == 0).all() and (gradient[1] == 0).all()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("channels, size", [(16, 8), (64, 3)])
def test_nst_makes_no_large_tensor(channels, size):
    student, teacher = maps(4, channels, size, size), maps(4, channels, size, size, seed=1)
    with LargestTensor() as ours:
        run(nst, student, teacher)
    assert ours.elements == 4 * channels * size**2  # the maps themselves, although channels squared may be more


def test_nst_term():
    expected = nst(STUDENT.maps[-1], TEACHER.maps[-1])
    term = TERMS["nst"]()
    assert term.needs == ("maps",) and term.reads_teacher and term.family == "feature" and term.default_weight == 10
    term.build(STUDENT, TEACHER, 3)
    assert torch.equal(term(STUDENT, TEACHER, BATCH), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(term(STUDENT, TEACHER, BATCH), expected)
    chosen = torch.stack([nst(STUDENT.maps[i], TEACHER.maps[i]) for i in (1, 3)]).mean()
    assert torch.allclose(TERMS["nst"](layers="1/3")(STUDENT, TEACHER, BATCH), chosen)


def vectors_of(x, count):
    """Singular values and right singular vectors of every (H W, C) map, from torch's decomposition."""
    _, sigma, right = torch.linalg.svd(x.flatten(2).mT, full_matrices=False)
    return sigma[:, :count], right.mT[:, :, :count]


def plain_kdsvd(student, teacher, k=1):
    """The formula image by image and pair by pair of channels, differentiated through torch's decomposition."""
    total = 0.0
    for n in range(len(student[0])):
        before = None
        for s, t in zip(student, teacher, strict=True):
            sigma, theirs = (part[0] for part in vectors_of(t[n : n + 1], k))
            offered = vectors_of(s[n : n + 1], k + 3)[1][0]
            scale = sigma / sigma.norm()
            now = []
            for j in range(k):
                v = theirs[:, j] if theirs[:, j].sum() >= 0 else -theirs[:, j]
                best = max(range(offered.shape[1]), key=lambda i: (offered[:, i] @ v).abs().item())
                own = offered[:, best]
                now.append((scale[j] * (own if own @ v >= 0 else -own), scale[j] * v))
            for (own, v), (own_before, v_before) in zip(now, before or [], strict=before is not None):
                for a, b in itertools.product(range(len(v)), range(len(v_before))):
                    ours = torch.exp(-((own[a] - own_before[b]) ** 2) / 8)
                    total = total + (ours - torch.exp(-((v[a] - v_before[b]) ** 2) / 8)) ** 2
            before = now
    return total / len(student[0])


def test_kdsvd_golden():
    pinned = case("rep_kdsvd", family="zoo")  # value only; maps after ReLU: their leading vectors have one sign
    inputs = pinned.inputs
    value = kdsvd([inputs["s1"], inputs["s2"]], [inputs["t1"], inputs["t2"]], pinned.hyper["k"])
    assert_close(value, pinned.outputs["loss"], 1e-6)


def test_kdsvd_golden_of_the_seed_up_to_signs(monkeypatch):
    """There the signs of the teacher's vectors are LAPACK's; two of three stages can turn, for each of three images."""
    pinned = arrays("zoo_kdsvd")
    student, teacher = ([pinned[f"{side}{i}"] for i in range(3)] for side in ("in_s", "t"))
    upright, matches = kdsvd_module._upright, 0
    for signs in itertools.product((1.0, -1.0), repeat=6):
        turns = iter([torch.ones(3), *torch.tensor(signs).view(2, 3)])
        monkeypatch.setattr(kdsvd_module, "_upright", lambda v, turns=turns: upright(v) * next(turns)[:, None, None])
        matches += abs(kdsvd(student, teacher).item() / pinned["loss"].item() - 1) < 1e-6
    assert matches == 1


STAGES = {
    "tall": ((2, 3, 4, 4), (2, 5, 4, 4)),
    "wide": ((2, 6, 2, 2), (2, 7, 2, 2)),
    "square and three": ((2, 4, 2, 2), (2, 5, 3, 3), (2, 6, 2, 2)),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shapes", STAGES.values(), ids=STAGES)
def test_kdsvd_oracle(shapes, k):
    student = [maps(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    teacher = [maps(*shape, seed=i + 10).requires_grad_() for i, shape in enumerate(shapes)]
    expected, value = plain_kdsvd(student, teacher, k), kdsvd(student, teacher, k)
    assert_close(value, expected.detach())
    plain = torch.autograd.grad(expected, student)
    for ours, theirs in zip(torch.autograd.grad(value, student + teacher, allow_unused=True), plain, strict=False):
        assert_close(ours, theirs)
    assert all(g is None for g in torch.autograd.grad(kdsvd(student, teacher, k), teacher, allow_unused=True))
    assert gradcheck(lambda *s: kdsvd(s, teacher, k), student)
    assert kdsvd(teacher, teacher, k) < 1e-20


def test_kdsvd_in_float32_and_half():
    student, teacher = ([maps(3, c, 6, 6, seed=s + c).relu() for c in (8, 12)] for s in (0, 1))
    exact = torch.autograd.grad(kdsvd([x.requires_grad_() for x in student], teacher), student)
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        lowered = [x.detach().to(dtype).requires_grad_() for x in student]
        value = kdsvd(lowered, [t.to(dtype) for t in teacher])
        assert value.dtype == torch.float32
        for x, expected in zip(torch.autograd.grad(value, lowered), exact, strict=True):
            assert x.dtype == dtype
            assert_close(x.double(), expected, rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [((2, 4, 4, 4), (2, 5, 4, 4)), ((2, 9, 2, 2), (2, 8, 2, 2))])
def test_kdsvd_degenerate_maps_have_bounded_gradients(shapes, dtype):
    teacher = [maps(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def equal(shape):  # all singular values are one
        rows = torch.eye(shape[2] * shape[3], shape[1], dtype=dtype).T.reshape(shape[1:])
        return rows.expand(shape).clone()

    def nearly_equal(shape):
        return equal(shape) + 1e-7 * maps(*shape, dtype=dtype)

    def rank_one(shape):
        return torch.ones(shape, dtype=dtype)

    def nearly_rank_one(shape):
        return rank_one(shape) + 1e-6 * maps(*shape, dtype=dtype)

    def one_dead(shape):
        x = maps(*shape, dtype=dtype, seed=5)
        x[0] = 0
        return x

    for make in (
        equal,
        nearly_equal,
        rank_one,
        nearly_rank_one,
        one_dead,
        lambda shape: torch.zeros(shape, dtype=dtype),
    ):
        student = [make(shape).requires_grad_() for shape in shapes]
        for k in (1, 2):
            value = kdsvd(student, teacher, k)
            for gradient in torch.autograd.grad(value, student):
                assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100
                if make is one_dead:
                    assert (gradient[0] == 0).all() and gradient[1].abs().max() > 0
            assert kdsvd(teacher, student, k).isfinite()


def test_kdsvd_does_not_hide_what_is_not_finite():
    student, teacher = ([maps(2, c, 3, 3, seed=s + c) for c in (3, 4)] for s in (0, 1))
    student[1][0, 0, 0, 0] = math.nan
    assert kdsvd(student, teacher).isnan()


def test_kdsvd_pools_the_larger_map():
    student = [maps(2, 3, 8, 8), maps(2, 4, 4, 4, seed=1)]
    teacher = [maps(2, 3, 4, 4, seed=2), maps(2, 4, 6, 6, seed=3)]
    pooled = [adaptive_avg_pool2d(x, 4) for x in (*student, *teacher)]
    assert_close(kdsvd(student, teacher), plain_kdsvd(pooled[:2], pooled[2:]))


def test_kdsvd_term_trains_a_transform_where_channels_differ():
    torch.manual_seed(0)
    term = TERMS["kdsvd"]()
    assert term.needs == ("maps",) and term.reads_teacher and term.family == "feature" and term.default_weight == 1
    term.build(STUDENT, TEACHER, 3)
    weights = list(term.parameters())
    assert [tuple(p.shape) for p in weights] == [(12, 4, 1, 1), (16, 6, 1, 1), (20, 8, 1, 1)]
    loss = term(STUDENT, TEACHER, BATCH)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in weights)
    mapped = [torch.einsum("nchw,dc->ndhw", s, w.flatten(1)) for s, w in zip(STUDENT.maps[1:], weights, strict=True)]
    pooled = [(adaptive_avg_pool2d(t, s.shape[2]), s) for s, t in zip(mapped, TEACHER.maps[-3:], strict=True)]
    assert torch.allclose(loss, kdsvd([s for _, s in pooled], [t for t, _ in pooled]), rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert term(STUDENT, TEACHER, BATCH).dtype == torch.float32


def test_kdsvd_term_without_parameters_where_channels_agree():
    term = TERMS["kdsvd"](layers="0/4", k=2)
    term.build(SAME, SAME, 3)
    assert not list(term.parameters())
    other = network((4, 6, 12, 16, 8), (16, 8, 8, 4, 2), seed=77)
    assert torch.equal(term(other, SAME, BATCH), kdsvd([other.maps[0], other.maps[4]], [SAME.maps[0], SAME.maps[4]], 2))


def test_bad_input():
    for name in ("nst", "kdsvd"):
        with pytest.raises(UserError, match="stage numbers"):
            TERMS[name](layers="2,3")
        with pytest.raises(UserError, match="stage 4, but the student has maps 0 to 3"):
            TERMS[name](layers="2/4").build(STUDENT, TEACHER, 3)
        with pytest.raises(UserError, match="the teacher gives no stage maps"):
            TERMS[name]().build(STUDENT, Output(), 3)
    with pytest.raises(UserError, match="1x1 maps; choose earlier stages"):
        TERMS["nst"]().build(network((4, 4), (4, 1)), TEACHER, 3)
    with pytest.raises(UserError, match="\\(N, C, H, W\\)"):
        nst(maps(2, 3), maps(2, 3))
    with pytest.raises(UserError, match="two or more"):
        TERMS["kdsvd"](layers="2").build(STUDENT, TEACHER, 3)
    with pytest.raises(UserError, match="two or more"):
        kdsvd([maps(2, 3, 4, 4)] * 2, [maps(2, 3, 4, 4)] * 3)
    with pytest.raises(UserError, match="equal channels; got 3 and 5"):
        kdsvd([maps(2, 3, 4, 4)] * 2, [maps(2, 5, 4, 4)] * 2)
    for k, rank in ((0, 12), (5, 4)):
        with pytest.raises(UserError, match=f"k = 1 to {rank}; got k={k}"):
            TERMS["kdsvd"](k=k).build(STUDENT, TEACHER, 3)
