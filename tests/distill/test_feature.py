import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck

from metric_kd.errors import UserError
from metric_kd.functional import at, fitnet
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))


def maps(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(widths, sizes, embedding, dtype=torch.float32, seed=0):
    stages = tuple(
        maps(2, c, s, s, dtype=dtype, seed=seed + i) for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
    )
    return Output(maps=stages, embedding=maps(2, embedding, dtype=dtype, seed=seed + 50))


STUDENT = network((4, 4, 6, 8), (8, 8, 4, 2), 5)
TEACHER = network((8, 8, 12, 16, 20), (16, 8, 8, 4, 2), 7, seed=9)


@pytest.mark.parametrize("name", ["zoo_at_p1", "zoo_at_p2", "zoo_at_p3", "rkd_at", "rep_at_pool"])
def test_at_golden(name):
    pinned = case(name)
    student, teacher = pinned.inputs.values()
    eps = 1e-6 if name.startswith("zoo") else 1e-12  # the others clamp the norm, which an eps that small amounts to
    loss = at(student.requires_grad_(), teacher, pinned.hyper["p"], eps)
    loss.backward()
    rtol = 1e-9
    assert_close(loss, pinned.outputs["loss"], rtol)
    if "grad_fm_s" in pinned.outputs:
        assert_close(student.grad, pinned.outputs["grad_fm_s"], rtol)
    else:
        (total,) = pinned.outputs["grad_abs_sum"].values()
        assert student.grad.abs().sum().item() == pytest.approx(total, rel=rtol)


@pytest.mark.parametrize("size", [4, 6, 3])
def test_at_oracle_and_pooling(size):
    student, teacher = maps(2, 3, 4, 4), maps(2, 5, size, size, seed=1)
    grid = min(size, 4)
    total = 0.0
    for n in range(2):
        attention = []
        for f in (student[n], teacher[n]):
            pooled = torch.nn.functional.adaptive_avg_pool2d(f[None], grid)[0]
            a = sum(channel**2 for channel in pooled)
            attention.append(a / (a.norm() + 1e-6))
        total += (attention[0] - attention[1]).square().sum() / (2 * grid * grid)
    assert_close(at(student, teacher), total)


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_at_gradcheck_and_dead_maps(p):
    teacher = maps(2, 5, 2, 2, seed=1)
    assert gradcheck(lambda s: at(s, teacher, p), maps(2, 3, 3, 3).requires_grad_())
    dead = maps(2, 3, 2, 2)
    dead[0] = 0
    dead.requires_grad_()
    at(dead, teacher, p).backward()
    assert dead.grad.isfinite().all()


def test_at_half_precision_does_not_overflow():
    student = (300 * maps(2, 64, 4, 4)).half().requires_grad_()
    loss = at(student, 300 * maps(2, 8, 4, 4, seed=1).half())
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and student.grad.isfinite().all()


def test_at_term_layers_and_reduction():
    pairs = list(zip(STUDENT.maps[-3:], TEACHER.maps[-3:], strict=True))
    gaps = torch.stack([at(s, t) for s, t in pairs])
    assert torch.allclose(TERMS["at"]()(STUDENT, TEACHER, BATCH), gaps.mean())
    assert torch.allclose(TERMS["at"](reduction="sum")(STUDENT, TEACHER, BATCH), gaps.sum())
    chosen = at(STUDENT.maps[0], TEACHER.maps[0]) + at(STUDENT.maps[3], TEACHER.maps[3])
    assert torch.allclose(TERMS["at"](layers="0/3", reduction="sum")(STUDENT, TEACHER, BATCH), chosen)


def test_fitnet_golden_4d():
    pinned = case("rkd_fitnet_4d")
    student = Output(maps=(pinned.inputs["student"].requires_grad_(),))
    teacher = Output(maps=(pinned.inputs["teacher"],))
    term = TERMS["fitnet"](embedding=False).double()
    term.build(student, teacher, 2)
    term.double().connectors[0].weight.data.copy_(pinned.aux["weight"])
    loss = term(student, teacher, BATCH)
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert_close(student.maps[0].grad, pinned.outputs["grad_student"])
    assert_close(term.connectors[0].weight.grad, pinned.outputs["grad_weight"])


def test_fitnet_golden_2d():
    pinned = case("rkd_fitnet_2d")
    x = pinned.inputs["student"].requires_grad_()
    loss = fitnet(x @ pinned.aux["weight"].flatten(1).T, pinned.inputs["teacher"])
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert_close(x.grad, pinned.outputs["grad_student"])


def test_fitnet_gradcheck():
    teacher = maps(2, 3, 2, 2, seed=1)
    assert gradcheck(lambda s: fitnet(s, teacher), maps(2, 3, 2, 2).requires_grad_())


def test_fitnet_term_trains_one_transform_for_each_pair():
    torch.manual_seed(0)
    term = TERMS["fitnet"]()
    term.build(STUDENT, TEACHER, 3)
    shapes = [tuple(p.shape) for p in term.parameters()]
    assert shapes == [(12, 4, 1, 1), (16, 6, 1, 1), (20, 8, 1, 1), (7, 5)]
    assert all(0.004 < p.abs().max() <= 0.005 for p in term.parameters())
    loss = term(STUDENT, TEACHER, BATCH)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    parts = [
        torch.nn.functional.conv2d(s, w)
        for s, w in zip(STUDENT.maps[1:], [p for p in term.parameters() if p.ndim == 4], strict=True)
    ]
    pooled = [
        torch.nn.functional.adaptive_avg_pool2d(p, min(p.shape[2], t.shape[2]))
        for p, t in zip(parts, TEACHER.maps[-3:], strict=True)
    ]
    targets = [
        torch.nn.functional.adaptive_avg_pool2d(t, p.shape[2]) for p, t in zip(pooled, TEACHER.maps[-3:], strict=True)
    ]
    expected = sum((p - t).square().mean() for p, t in zip(pooled, targets, strict=True))
    expected = expected + (STUDENT.embedding @ list(term.parameters())[-1].T - TEACHER.embedding).square().mean()
    assert torch.allclose(loss, expected)


def test_fitnet_options_narrow_the_needs():
    term = TERMS["fitnet"](layers="1/2", embedding=False)
    assert term.needs == ("maps",) and TERMS["fitnet"].needs == ("maps", "embedding")
    term.build(STUDENT, TEACHER, 3)
    assert [tuple(p.shape) for p in term.parameters()] == [(8, 4, 1, 1), (12, 6, 1, 1)]


@pytest.mark.parametrize("name", ["at", "fitnet"])
def test_terms_in_half_precision_and_without_teacher_gradient(name):
    term = TERMS[name]()
    assert term.reads_teacher and term.family == "feature" and term.paper
    term.build(STUDENT, TEACHER, 3)
    teacher = Output(maps=tuple(m.clone().requires_grad_() for m in TEACHER.maps), embedding=TEACHER.embedding)
    expected = term(STUDENT, teacher, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = term(STUDENT, teacher, BATCH)
    assert lowered.dtype == torch.float32 and torch.allclose(lowered, expected, rtol=1e-2)
    half = Output(
        maps=tuple(m.bfloat16().requires_grad_() for m in STUDENT.maps), embedding=STUDENT.embedding.bfloat16()
    )
    loss = term(half, teacher, BATCH)
    loss.backward()
    assert loss.dtype == torch.float32 and half.maps[-1].grad.abs().sum() > 0
    assert all(m.grad is None for m in teacher.maps)


def test_bad_input():
    for name in ("at", "fitnet"):
        with pytest.raises(UserError, match="stage numbers"):
            TERMS[name](layers="2,3")
        with pytest.raises(UserError, match="stage 4, but the student has maps 0 to 3"):
            TERMS[name](layers="2/4").build(STUDENT, TEACHER, 3)
        with pytest.raises(UserError, match="the teacher gives no stage maps"):
            TERMS[name]().build(STUDENT, Output(), 3)
        with pytest.raises(UserError, match="the student gives no stage maps"):
            TERMS[name]().build(Output(), TEACHER, 3)
    with pytest.raises(UserError, match="p of 1 or more"):
        TERMS["at"](p=0.5)
    with pytest.raises(UserError, match="p of 1 or more"):
        at(maps(1, 2, 2, 2), maps(1, 2, 2, 2), 0.5)
    with pytest.raises(UserError, match="did you mean 'sum'"):
        TERMS["at"](reduction="summ")
    with pytest.raises(UserError, match="\\(N, C, H, W\\)"):
        at(maps(2, 3), maps(2, 3))
    with pytest.raises(UserError, match="one shape"):
        fitnet(maps(2, 3), maps(2, 4))
    with pytest.raises(UserError, match="embedding=false"):
        TERMS["fitnet"]().build(STUDENT._replace(embedding=None), TEACHER, 3)


def test_fitnet_golden_without_connector():
    zoo = case("zoo_hint", family="zoo")
    student, teacher = zoo.inputs["fm_s"], zoo.inputs["fm_t"]
    seeds = arrays("zoo_hint")
    for s, t, loss, grad in (
        (student, teacher, zoo.outputs["loss"], zoo.outputs["grad_fm_s"]),
        (seeds["in_s1"], seeds["t1"], seeds["loss"], seeds["grad_s1"]),
    ):
        ours, theirs = Output(maps=(s.requires_grad_(),)), Output(maps=(t,))
        term = TERMS["fitnet"](embedding=False, connector="none")
        term.build(ours, theirs, 2)
        value = term(ours, theirs, BATCH)
        value.backward()
        assert not list(term.parameters())
        assert_close(value, loss)
        assert_close(s.grad, grad)


def test_fitnet_without_connector_refuses_other_shapes_before_training():
    same = network((4, 4, 6, 8), (8, 8, 4, 2), 5, seed=3)
    term = TERMS["fitnet"](connector="none")
    term.build(STUDENT, same, 3)
    expected = sum(fitnet(s, t) for s, t in zip(STUDENT.maps[1:], same.maps[1:], strict=True))
    assert torch.allclose(term(STUDENT, same, BATCH), expected + fitnet(STUDENT.embedding, same.embedding))
    with pytest.raises(UserError, match="has 5 where the teacher has 7: choose connector=linear"):
        term.build(STUDENT, same._replace(embedding=TEACHER.embedding), 3)
    with pytest.raises(UserError, match="has 8x2x2 where the teacher has 8x4x4"):
        term.build(STUDENT, same._replace(maps=(*same.maps[:3], maps(2, 8, 4, 4))), 3)
    with pytest.raises(UserError, match="did you mean 'regressor'"):
        TERMS["fitnet"](connector="regresor")


def test_fitnet_regressor_reaches_the_teachers_grid():
    torch.manual_seed(0)
    student = network((4, 4, 6, 8), (8, 8, 4, 2), 5)
    teacher = network((4, 8, 12, 16), (8, 4, 8, 1), 7, seed=9)
    term = TERMS["fitnet"](connector="regressor")
    term.build(student, teacher, 3)
    kernels = [tuple(p.shape) for p in term.parameters() if p.ndim == 4]
    assert kernels == [(8, 4, 3, 3), (6, 12, 4, 4), (16, 8, 3, 3)]
    assert list(term.connectors[-1].parameters())[0].shape == (7, 5)
    loss = term(student, teacher, BATCH)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in term.parameters())
    parts = [
        fitnet(layer(s), t)
        for layer, s, t in zip(term.connectors[:-1], student.maps[1:], teacher.maps[1:], strict=True)
    ]
    assert torch.allclose(loss, sum(parts) + fitnet(term.connectors[-1](student.embedding), teacher.embedding))
    with pytest.raises(UserError, match="no regressor leads from a grid of 2x2 to one of 3x3"):
        TERMS["fitnet"](connector="regressor", layers="3").build(
            student, teacher._replace(maps=(*teacher.maps[:3], maps(2, 16, 3, 3))), 3
        )
