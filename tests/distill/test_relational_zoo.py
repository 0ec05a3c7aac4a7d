import math

import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck

from metric_kd.distances import Pairwise, sharing
from metric_kd.errors import UserError
from metric_kd.functional import cc, pkt, rkd_angle, rkd_distance, sp
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

LOSSES = {"pkt": pkt, "sp": sp, "cc": cc}


def rows(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def batch(n):
    return Batch(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), torch.arange(n))


def run(loss, student, teacher, **options):
    x = student.clone().requires_grad_()
    value = loss(x, teacher, **options)
    value.backward()
    return value.detach(), x.grad


def rkd(student, teacher):
    return TERMS["rkd"]()(Output(embedding=student), Output(embedding=teacher), batch(len(student)))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def matrix_gap(first, second, gap):
    n = len(first)
    total = sum(gap(first[i][j], second[i][j]) for i in range(n) for j in range(n))
    return torch.tensor(total / n**2, dtype=torch.float64)


def squared(a, b):
    return (a - b) ** 2


def slow_pkt(student, teacher, eps=1e-6):
    def probabilities(x):
        x = [[v / (math.sqrt(dot(row, row)) + eps) for v in row] for row in x.tolist()]
        kernel = [[(dot(a, b) + 1) / 2 for b in x] for a in x]
        return [[v / sum(row) for v in row] for row in kernel]

    return matrix_gap(probabilities(student), probabilities(teacher), lambda s, t: t * math.log((t + eps) / (s + eps)))


def slow_cc(student, teacher, gamma=0.4, order=2):
    def kernel(x):
        x = [[v / math.sqrt(dot(row, row)) for v in row] for row in x.tolist()]
        terms = [[[(2 * gamma * dot(a, b)) ** p / math.factorial(p) for p in range(order + 1)] for b in x] for a in x]
        return [[math.exp(-2 * gamma) * sum(entry) for entry in row] for row in terms]

    return matrix_gap(kernel(student), kernel(teacher), squared)


def slow_sp(student, teacher):
    def similarity(x):
        x = [item.flatten().tolist() for item in x]
        gram = [[dot(a, b) for b in x] for a in x]
        return [[v / math.sqrt(dot(row, row)) for v in row] for row in gram]

    return matrix_gap(similarity(student), similarity(teacher), squared)


SLOW = {"pkt": slow_pkt, "sp": slow_sp, "cc": slow_cc}

GOLDEN = {
    "zoo_sp": (sp, {}),
    "rep_sp": (sp, {}),
    "zoo_sp_mismatch": (sp, {}),
    "zoo_pkt": (pkt, {}),
    "rep_pkt": (pkt, {"eps": 1e-7}),
    "zoo_cc_P2": (cc, {}),
    "zoo_cc_P4": (cc, {"gamma": 0.4, "order": 4}),
    "rep_rkd": (rkd, {}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    pinned, (loss, options) = case(name, family="zoo"), GOLDEN[name]
    value, gradient = run(loss, *pinned.inputs.values(), **options)
    assert_close(value, pinned.outputs["loss"])
    (expected,) = [v for k, v in pinned.outputs.items() if k.startswith("grad_")]
    if isinstance(expected, dict):
        assert gradient.abs().sum().item() == pytest.approx(*expected.values(), rel=1e-9)
    else:
        assert_close(gradient, expected)


@pytest.mark.parametrize(
    "name, loss, options", [("zoo_sp", sp, {}), ("zoo_pkt", pkt, {"eps": 1e-7}), ("zoo_rkd", rkd, {})]
)
def test_golden_of_the_seed(name, loss, options):
    pinned = arrays(name)
    (student,) = [v for k, v in pinned.items() if k.startswith("in_")]
    (teacher,) = [v for k, v in pinned.items() if k.startswith(("t2", "ft"))]
    (expected,) = [v for k, v in pinned.items() if k.startswith("grad_")]
    value, gradient = run(loss, student, teacher, **options)
    assert_close(value, pinned["loss"])
    assert_close(gradient, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [2, 5])
def test_oracles(name, n):
    student, teacher = rows(n, 3), rows(n, 4, seed=1)
    assert_close(LOSSES[name](student, teacher), SLOW[name](student, teacher))


def test_oracles_with_options_and_maps():
    student, teacher = rows(4, 3), rows(4, 5, seed=1)
    assert_close(pkt(student, teacher, 1e-3), slow_pkt(student, teacher, 1e-3))
    assert_close(cc(student, teacher, 1.3, 5), slow_cc(student, teacher, 1.3, 5))
    assert_close(cc(student, teacher, 1.3, 1), slow_cc(student, teacher, 1.3, 1))
    student, teacher = rows(4, 3, 2, 2), rows(4, 2, 5, 5, seed=1)
    assert_close(sp(student, teacher), slow_sp(student, teacher))


def test_cc_of_a_high_order_is_the_gaussian_kernel():
    student, teacher = rows(5, 3), rows(5, 4, seed=1)
    kernels = []
    for x in (student, teacher):
        unit = x / x.norm(dim=1, keepdim=True)
        kernels.append(torch.exp(-0.4 * torch.cdist(unit, unit).square()))
    assert_close(cc(student, teacher, 0.4, 30), (kernels[0] - kernels[1]).square().mean())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_and_the_teacher_as_student(name):
    student, teacher = rows(4, 3).requires_grad_(), rows(4, 5, seed=1).requires_grad_()
    assert gradcheck(lambda s: LOSSES[name](s, teacher), student)
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    value, gradient = run(LOSSES[name], teacher.detach(), teacher)
    assert value.abs() < 1e-15 and gradient.abs().max() < (1e-6 if name == "pkt" else 1e-15)  # pkt: of the order of eps


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_small_batches_are_finite_and_differentiable(name, n, dtype):
    value, gradient = run(LOSSES[name], rows(n, 4, dtype=dtype), rows(n, 6, dtype=dtype, seed=1))
    assert value.shape == () and value.isfinite() and gradient.shape == (n, 4) and gradient.isfinite().all()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    if n < 2:
        assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_duplicate_and_opposite_rows(name, dtype):
    teacher = rows(8, 7, dtype=dtype, seed=1)
    for which, change in {"zero": 0.0, "duplicate": 1.0, "opposite": -1.0}.items():
        student = rows(8, 5, dtype=dtype)
        student[3] = change * student[5]
        value, gradient = run(LOSSES[name], student, teacher)
        assert value.isfinite() and gradient.isfinite().all() and 0 < gradient.abs().max() < 10, which
        assert LOSSES[name](teacher, student).isfinite()
        if which == "zero" and name != "sp":  # the inner products of the other images do pull at a zero one
            assert (gradient[3] == 0).all()
    value, gradient = run(LOSSES[name], torch.zeros_like(student), teacher)
    assert value.isfinite() and (gradient == 0).all()
    value, gradient = run(LOSSES[name], torch.ones_like(student), teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 10


def test_pkt_of_opposite_rows_survives_rounding():
    student = rows(40, 6, dtype=torch.float32)
    student = torch.cat([student, -student])  # some cosines round to below -1
    assert pkt(student, rows(80, 5, dtype=torch.float32, seed=1), eps=1e-12).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_large_and_small_rows_in_half_precision(name):
    student, teacher = rows(6, 64), rows(6, 64, seed=1)
    expected = LOSSES[name](student, teacher)
    for scale in (1e4, 1e-2):
        value, gradient = run(LOSSES[name], (scale * student).half(), teacher.half())
        assert gradient.isfinite().all() and (
            scale > 1 or gradient.abs().sum() > 0
        )  # of 1e-4 / scale: too small for half
        assert value.item() == pytest.approx(expected.item(), rel=2e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_invariances(name):
    student, teacher = rows(6, 5), rows(6, 4, seed=1)
    expected = LOSSES[name](student, teacher)
    rotation = torch.linalg.qr(rows(5, 5, seed=2)).Q
    assert_close(LOSSES[name](student @ rotation, teacher), expected)
    assert_close(LOSSES[name](1e3 * student, 1e-3 * teacher), expected, 1e-9 if name != "pkt" else 1e-2)  # pkt: eps
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_close(LOSSES[name](student[order], teacher[order]), expected)
    if name == "cc":  # cosines only; sp and the eps of pkt see the length of a row
        assert_close(cc(student * torch.arange(1.0, 7.0).double()[:, None], teacher), expected)


def test_sp_keeps_far_too_short_a_batch_apart_from_a_short_row():
    student, teacher = rows(6, 5), rows(6, 4, seed=1)
    value, gradient = run(sp, 1e-5 * student, teacher)
    assert_close(value, sp(student, teacher))
    assert_close(1e-5 * gradient, run(sp, student, teacher)[1])


@pytest.mark.parametrize("name", LOSSES)
def test_not_finite_rows_are_not_hidden(name):
    student, teacher = rows(6, 3), rows(6, 3, seed=1)
    student[2, 0] = math.nan
    assert LOSSES[name](student, teacher).isnan()


@pytest.mark.parametrize("name", ["pkt", "cc"])
def test_accepts_pairwise(name):
    student, teacher = rows(6, 3), rows(6, 5, seed=1)
    assert torch.equal(LOSSES[name](Pairwise(student), Pairwise(teacher)), LOSSES[name](student, teacher))


@pytest.mark.parametrize("name, weight", [("pkt", 10000), ("cc", 100), ("rkd", 1)])
def test_terms_on_embeddings(name, weight):
    student, teacher = rows(6, 3, dtype=torch.float32), rows(6, 5, dtype=torch.float32, seed=1)
    term = TERMS[name]()
    assert term.reads_teacher and term.family == "relational" and term.needs == ("embedding",) and term.paper
    assert term.default_weight == weight
    outputs = Output(embedding=student), Output(embedding=teacher)
    term.build(*outputs, 5)
    expected = {"rkd": rkd, **LOSSES}[name](student, teacher)
    assert torch.equal(term(*outputs, batch(6)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = term(*outputs, batch(6))
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert term(Output(embedding=student.bfloat16()), outputs[1], batch(6)).dtype == torch.float32


def test_options_reach_the_loss():
    student, teacher = rows(6, 3), rows(6, 5, seed=1)
    outputs = Output(embedding=student), Output(embedding=teacher)
    assert torch.equal(TERMS["pkt"](eps=1e-3)(*outputs, batch(6)), pkt(student, teacher, 1e-3))
    assert torch.equal(TERMS["cc"](gamma=0.7, order=3)(*outputs, batch(6)), cc(student, teacher, 0.7, 3))


def test_rkd_weighs_its_two_parts_and_shares_distances():
    student, teacher = rows(6, 3), rows(6, 5, seed=1)
    outputs = Output(embedding=student), Output(embedding=teacher)
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    assert_close(TERMS["rkd"]()(*outputs, batch(6)), 25 * distance + 50 * angle)
    assert_close(TERMS["rkd"](distance=1.0, angle=2.0)(*outputs, batch(6)), distance + 2 * angle)
    assert_close(TERMS["rkd"](angle=0.0)(*outputs, batch(6)), 25 * distance)
    assert_close(TERMS["rkd"](distance=0.0)(*outputs, batch(6)), 50 * angle)
    with sharing():
        TERMS["rkd"]()(*outputs, batch(6))
        assert {"squared", "distances"} <= vars(Pairwise.of(student)).keys()


def network(widths, sizes, seed=0):
    maps = [
        rows(4, c, s, s, dtype=torch.float32, seed=seed + i) for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
    ]
    return Output(maps=tuple(maps), embedding=rows(4, 5, dtype=torch.float32, seed=seed + 50))


def test_sp_term():
    student, teacher = network((4, 4, 6, 8), (8, 8, 4, 2)), network((8, 8, 12, 16, 20), (16, 8, 8, 4, 2), seed=9)
    gaps = torch.stack([sp(s, t) for s, t in zip(student.maps[-3:], teacher.maps[-3:], strict=True)])
    term = TERMS["sp"]()
    assert term.needs == ("maps",) and term.default_weight == 3000 and term.family == "relational"
    term.build(student, teacher, 5)
    assert torch.allclose(term(student, teacher, batch(4)), gaps.mean())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(term(student, teacher, batch(4)), gaps.mean())
    assert torch.equal(TERMS["sp"](layers="3")(student, teacher, batch(4)), sp(student.maps[3], teacher.maps[3]))
    term = TERMS["sp"](features="embedding")
    assert term.needs == ("embedding",) and TERMS["sp"].needs == ("maps",)
    ours, theirs = student._replace(maps=None), teacher._replace(maps=None)
    term.build(ours, theirs, 5)
    assert torch.equal(term(ours, theirs, batch(4)), sp(student.embedding, teacher.embedding))


def test_bad_input():
    for loss in LOSSES.values():
        with pytest.raises(UserError, match="same images; got 4 and 5"):
            loss(rows(4, 3), rows(5, 3))
    for eps in (0.0, -1.0):
        with pytest.raises(UserError, match="eps above 0"):
            TERMS["pkt"](eps=eps)
        with pytest.raises(UserError, match="eps above 0"):
            pkt(rows(4, 3), rows(4, 3), eps)
    for options in ({"gamma": 0.0}, {"order": 0}):
        with pytest.raises(UserError, match="gamma > 0 and order >= 1"):
            TERMS["cc"](**options)
        with pytest.raises(UserError, match="gamma > 0 and order >= 1"):
            cc(rows(4, 3), rows(4, 3), **options)
    for options in ({"distance": -1.0}, {"angle": -1.0}, {"distance": 0.0, "angle": 0.0}):
        with pytest.raises(UserError, match="rkd needs factors"):
            TERMS["rkd"](**options)
    with pytest.raises(UserError, match="sp compares features"):
        sp(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UserError, match="did you mean 'maps'"):
        TERMS["sp"](features="map")
    with pytest.raises(UserError, match="embeddings or stages"):
        TERMS["sp"](features="embedding", layers="2")
    with pytest.raises(UserError, match="the teacher gives no stage maps"):
        TERMS["sp"]().build(network((4,), (4,)), Output(), 5)
