"""The three pure functions of instance relationship graphs; the term is in test_irg_term.py."""

import itertools

import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck

from metric_kd.distances import Pairwise
from metric_kd.distill.relational.irg import graph_edges
from metric_kd.distill.relational_graph import matched
from metric_kd.errors import UserError
from metric_kd.functional import irg_edge, irg_transformation, irg_vertex


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_golden_functions_of_the_zoo():
    i = case("zoo_irg", family="zoo").inputs
    assert_close(irg_vertex(i["out_s"], i["out_t"]), case("zoo_irg_vert", family="zoo").outputs["loss"])
    edges = [irg_edge(i[s], i[t]) for s, t in (("s1", "t1"), ("s2", "t2"), ("feat_s", "feat_t"))]
    assert_close(sum(edges) / 3, case("zoo_irg_edge", family="zoo").outputs["loss"])
    moved = irg_transformation((i["s1"], i["s2"]), (i["t1"], i["t2"]))
    assert_close(moved, case("zoo_irg_tran", family="zoo").outputs["loss"])


@pytest.mark.parametrize(
    ("options", "gradient"),
    [({"caffe": True}, "grad_ref"), ({"detach_max": True}, "grad_true_const"), ({}, "grad_true_full")],
)
def test_golden_map_layer_of_caffe(options, gradient):
    g = arrays("irg_map")
    x = g["Xs"].requires_grad_()
    loss = irg_edge(x, g["Xt"], reduction="caffe", **options)
    assert_close(loss, g["loss_unweighted"])
    assert_close(graph_edges(Pairwise.of(g["Xt"])), g["Dt"])
    assert_close(graph_edges(Pairwise.of(x)), g["Ds"])
    (g["loss_weight"] * loss).backward()
    assert_close(x.grad, g[gradient])


@pytest.mark.parametrize(
    ("options", "rule"), [({"caffe": True}, "asym_grad_ref"), ({"detach_max": True}, "asym_grad_true_const")]
)
def test_golden_gradient_of_an_asymmetric_upstream_gradient(options, rule):
    g = arrays("irg_map")
    x = g["Xs"].requires_grad_()
    graph_edges(Pairwise.of(x), **options).backward(g["asym_top_diff"])
    assert_close(x.grad, g[rule])


@pytest.mark.parametrize(("detach_max", "gradient"), [(True, "grad_ref"), (False, "grad_true_full")])
def test_golden_vector_layer_of_caffe(detach_max, gradient):
    g = arrays("irg_vector")
    early, late = g["s_early"].requires_grad_(), g["s_late"].requires_grad_()
    teacher = (g["t_early"], g["t_late"])
    loss = irg_transformation((early, late), teacher, reduction="caffe", detach_max=detach_max)
    assert_close(loss, g["loss_unweighted"])
    assert_close(g["loss_weight"] * loss, g["loss"])
    (g["loss_weight"] * loss).backward()
    assert_close(early.grad, g[f"{gradient}_early"])
    assert_close(late.grad, g[f"{gradient}_late"])


# ---- slow formulas


def slow_edges(x, normalise):
    x = x.flatten(1)
    rows = [[(x[i] - x[j]).square().sum() for j in range(len(x))] for i in range(len(x))]
    a = torch.stack([torch.stack(row) for row in rows])
    return a / a.max() if normalise else a


def slow_reduction(gap, reduction, caffe_count):
    total = sum(g**2 for g in gap.flatten())
    return total / {"mean": gap.numel(), "sum": 1, "caffe": 2 * caffe_count}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "caffe"])
@pytest.mark.parametrize("normalise", [True, False])
def test_edges_by_hand(reduction, normalise):
    student, teacher = rand(5, 3, 2, 2).requires_grad_(), rand(5, 7, seed=1)
    loss = irg_edge(student, teacher, normalise=normalise, reduction=reduction)
    expected = slow_reduction(slow_edges(student, normalise) - slow_edges(teacher, normalise), reduction, 5)
    assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    assert_close(ours, theirs)


def slow_step(earlier, later, normalise):
    """Zoo's rule by hand: every position of the later grid, every group of channels."""
    side = later.shape[2]
    cell = earlier.shape[2] // side
    group = later.shape[1] // earlier.shape[1]
    lengths = []
    for n in range(len(earlier)):
        total = 0.0
        for c, h, w in itertools.product(range(earlier.shape[1]), range(side), range(side)):
            before = earlier[n, c, h * cell : (h + 1) * cell, w * cell : (w + 1) * cell].mean()
            total = total + (later[n, c * group : (c + 1) * group, h, w].mean() - before) ** 2
        lengths.append(total)
    v = torch.stack(lengths)
    return v / v.max() if normalise else v


@pytest.mark.parametrize("reduction", ["mean", "sum", "caffe"])
@pytest.mark.parametrize("normalise", [True, False])
def test_transformations_by_hand(reduction, normalise):
    student = (rand(3, 2, 4, 4).requires_grad_(), rand(3, 6, 2, 2, seed=1).requires_grad_())
    teacher = (rand(3, 4, 3, 3, seed=2), rand(3, 4, 1, 1, seed=3))
    loss = irg_transformation(student, teacher, normalise=normalise, reduction=reduction)
    expected = slow_reduction(slow_step(*student, normalise) - slow_step(*teacher, normalise), reduction, 1)
    assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 12), ("sum", 1), ("caffe", 8)])
def test_vertices_by_hand(reduction, divisor):
    student, teacher = rand(4, 3), rand(4, 3, seed=1)
    total = sum((student[i, k] - teacher[i, k]) ** 2 for i in range(4) for k in range(3))
    assert_close(irg_vertex(student, teacher, reduction=reduction), total / divisor)


def test_matched_layers():
    rows, maps = rand(3, 2), rand(3, 6, 4, 4, seed=1)
    earlier, later = matched(rows, maps)
    assert earlier is rows and torch.allclose(later, maps.mean((2, 3)).view(3, 2, 3).mean(2))
    earlier, later = matched(maps, rand(3, 3, 2, 2))  # the earlier one may be the wider one
    assert earlier.shape == later.shape == (3, 3, 2, 2)
    assert torch.allclose(earlier[:, 1], torch.nn.functional.avg_pool2d(maps[:, 2:4].mean(1), 2))
    with pytest.raises(UserError, match="between 6 and 4 channels"):
        matched(maps, rand(3, 4, 2, 2))
    with pytest.raises(UserError, match="two layers of one batch"):
        matched(maps, rand(2, 6, 4, 4))
    with pytest.raises(UserError, match="two layers of one batch"):
        matched(maps, rand(3, 6, 4))


def test_gradcheck():
    teacher, pair = rand(4, 5, seed=1), (rand(4, 2, 2, 2, seed=2), rand(4, 4, seed=3))
    for options in ({}, {"normalise": False}, {"reduction": "sum"}):
        assert gradcheck(lambda s, o=options: irg_edge(s, teacher, **o), rand(4, 3).requires_grad_())
        ours = (rand(4, 2, 2, 2).requires_grad_(), rand(4, 4, 1, 1, seed=5).requires_grad_())
        assert gradcheck(lambda a, b, o=options: irg_transformation((a, b), pair, **o), ours)


# ---- what the losses do not see


def test_edges_see_similar_graphs_as_one():
    student, teacher = rand(6, 4), rand(6, 4, seed=1)
    rotation = torch.linalg.qr(rand(4, 4, seed=2)).Q
    moved = 3 * student @ rotation + rand(4, seed=3)
    assert_close(irg_edge(moved, teacher), irg_edge(student, teacher))
    assert irg_edge(moved, student) < 1e-25 < irg_edge(moved, student, normalise=False)
    order = [3, 0, 5, 1, 2, 4]
    assert_close(irg_edge(student[order], teacher[order]), irg_edge(student, teacher))
    assert irg_edge(student, student[order]) > 1e-3


def test_transformations_see_scaled_steps_as_one():
    early, late = rand(5, 4, 2, 2), rand(5, 4, 2, 2, seed=1)
    assert irg_transformation((2 * early, 2 * late), (early, late)) < 1e-25
    assert irg_transformation((early + 7, late + 7), (early, late), normalise=False) < 1e-20
    assert irg_transformation((early, 2 * late), (early, late)) > 1e-4


# ---- numerics


DEGENERATE = {
    "one image": rand(1, 4),
    "all zero": torch.zeros(5, 4, dtype=torch.float64),
    "all alike": rand(1, 4).repeat(5, 1),
    "all alike, far out": (1e4 + rand(1, 4)).repeat(5, 1),
}


@pytest.mark.parametrize("rows", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("options", [{}, {"detach_max": True}, {"caffe": True}], ids=str)
def test_graphs_without_a_maximum_give_nothing(rows, options):
    for dtype in (torch.float64, torch.float32):
        x = rows.to(dtype).clone().requires_grad_()
        loss = irg_edge(x, rand(len(x), 3), **options)
        loss.backward()
        assert loss == 0 and not x.grad.any()
        healthy = rand(len(x), 3).to(dtype).requires_grad_()
        loss = irg_edge(healthy, rows, **options)
        loss.backward()
        assert loss == 0 and not healthy.grad.any()
    one = rand(1, 4).requires_grad_()
    assert irg_edge(one, rand(1, 3), normalise=False, **options) == 0


def test_steps_without_a_maximum_give_nothing():
    still, moving = rand(5, 4), (rand(5, 4, seed=1), rand(5, 4, seed=2))
    x = still.clone().requires_grad_()
    loss = irg_transformation((x, still), moving)
    loss.backward()
    assert loss == 0 and not x.grad.any()
    y = moving[0].clone().requires_grad_()
    loss = irg_transformation((y, moving[1]), (still, still))
    loss.backward()
    assert loss == 0 and not y.grad.any()
    one = rand(1, 4).requires_grad_()
    loss = irg_transformation((one, still[:1]), (moving[0][:1], moving[1][:1]))
    loss.backward()
    assert loss == 0 and not one.grad.any()


@pytest.mark.parametrize("options", [{}, {"detach_max": True}, {"caffe": True}], ids=str)
def test_duplicates_and_dead_rows_have_tame_gradients(options):
    x = rand(6, 4)
    x[1] = x[0]
    x[3:5] = 0
    x.requires_grad_()
    irg_edge(x, rand(6, 3, seed=1), **options).backward()
    assert x.grad.isfinite().all() and 0 < x.grad.abs().max() < 10


def test_nan_stays_nan():
    broken = rand(4, 3)
    broken[1, 1] = float("nan")
    assert irg_edge(broken, rand(4, 3)).isnan() and irg_edge(rand(4, 3), broken).isnan()
    assert irg_transformation((broken, rand(4, 3)), (rand(4, 3), rand(4, 3, seed=1))).isnan()


def test_bad_input_of_the_functions():
    with pytest.raises(UserError, match="did you mean 'mean'"):
        irg_edge(rand(4, 3), rand(4, 3), reduction="meen")
    with pytest.raises(UserError, match="did you mean 'sum'"):
        irg_vertex(rand(4, 3), rand(4, 3), reduction="summ")
    with pytest.raises(UserError, match="rows of one width"):
        irg_vertex(rand(4, 3), rand(4, 2))
    with pytest.raises(UserError, match="same images"):
        irg_edge(rand(4, 3), rand(5, 3))
    with pytest.raises(UserError, match="same images"):
        irg_transformation((rand(4, 3), rand(4, 3)), (rand(5, 3), rand(5, 3)))
