"""The term irg: presets, modes, lists of layers, and what it refuses; its functions are in test_irg.py."""

import pytest
import torch
from pinned import arrays, assert_close, case

from metric_kd.distances import Pairwise
from metric_kd.errors import UserError
from metric_kd.functional import cross_entropy, irg_edge, irg_transformation, irg_vertex
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(6, 3, 1, 1, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64), torch.arange(6))


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(widths=(4, 4, 8, 16), sizes=(8, 8, 4, 2), embedding=5, classes=3, n=6, seed=0, dtype=torch.float64):
    maps = tuple(
        rand(n, c, s, s, seed=seed + i, dtype=dtype) for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
    )
    return Output(maps=maps, embedding=rand(n, embedding, seed=seed + 50), logits=rand(n, classes, seed=seed + 60))


STUDENT = network()
TEACHER = network((6, 6, 12, 24, 24), (16, 16, 8, 4, 2), embedding=7, seed=100)


def term(**options):
    return TERMS["irg"](**options)


def value(student=STUDENT, teacher=TEACHER, **options):
    return term(**options)(student, teacher, BATCH)


ZOO = ("s1", "s2", "feat_s", "out_s")


@pytest.mark.parametrize("name", ["zoo_irg", "zoo_irg_vert", "zoo_irg_edge", "zoo_irg_tran"])
def test_golden_of_the_zoo_are_the_defaults(name):
    pinned = case(name, family="zoo")
    for key in ZOO:
        pinned.inputs[key].requires_grad_()
    i = pinned.inputs
    student = Output(maps=(i["s1"], i["s2"]), embedding=i["feat_s"], logits=i["out_s"])
    teacher = Output(maps=(i["t1"], i["t2"]), embedding=i["feat_t"], logits=i["out_t"])
    h = pinned.hyper
    ours = term(vertex=h["w_vert"], edge=h["w_edge"], transformation=h["w_tran"])
    assert (term().vertex, term().edge, term().transformation) == (0.1, 5.0, 5.0)
    ours.build(student, teacher, 10)
    loss = ours(student, teacher, BATCH)
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    checked = [key for key in ZOO if f"grad_{key}" in pinned.outputs]
    assert len(checked) == (4 if name == "zoo_irg" else 0)
    for key in checked:
        assert_close(i[key].grad, pinned.outputs[f"grad_{key}"])


@pytest.mark.parametrize("kind", ["raw", "norm"])
def test_golden_multi_type_knowledge_of_the_paper(kind):
    g, steps = arrays("irg_mtk_paper"), arrays("irg_vector")

    def as_maps(*features):
        return tuple(f[:, :, None, None] for f in features)

    student = Output(
        maps=as_maps(steps["s_early"], steps["s_late"], g["stu_l0"], g["stu_l1"], g["stu_l2"]),
        logits=g["student_logits"],
    )
    teacher = Output(maps=as_maps(steps["t_early"], steps["t_late"], g["teacher_last"]), logits=g["teacher_logits"])
    paper = {"preset": "paper", "normalise": kind == "norm", "transformation_layers": "0-1"}
    parts = {"vertex": g["l_logits"], "edge": g[f"l_edge_{kind}"], "transformation": g[f"l_trans_{kind}"]}
    for part in parts:
        alone = {name: float(name == part) for name in parts}
        assert_close(value(student, teacher, **paper, **alone), parts[part])
    weights = dict(zip(parts, g["lambdas"].tolist(), strict=True))
    total = value(student, teacher, **paper, **weights)
    assert_close(total + cross_entropy(g["student_logits"], g["labels"]), g[f"total_{kind}"])


def test_equal_networks_lose_nothing():
    for preset in ("zoo", "caffe", "caffe_transformation"):
        assert value(STUDENT, STUDENT, preset=preset) < 1e-25
    assert value(STUDENT, STUDENT, preset="paper") > 0  # its last stage guides all: earlier stages differ from it


@pytest.mark.parametrize("preset", ["zoo", "paper", "caffe", "caffe_transformation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_large_values(preset, dtype):
    def lowered(output, scale):
        maps = tuple((scale * m.relu()).to(dtype).requires_grad_() for m in output.maps)
        return Output(maps, None, None, (scale * output.embedding).requires_grad_(), 1e4 * output.logits)

    student, teacher = lowered(STUDENT, 1e4), lowered(TEACHER._replace(embedding=STUDENT.embedding), 1e4)
    ours = term(preset=preset, vertex=0.0, transformation_layers="1-2/2-3", teacher_transformation_layers="2-3/3-4")
    loss = ours(student, teacher, BATCH)
    loss.backward()
    assert loss.isfinite() and loss.dtype in (torch.float32, torch.float64)
    assert student.maps[-1].grad.isfinite().all() and student.maps[-1].grad.float().abs().max() < 10
    assert all(m.grad is None for m in teacher.maps) and teacher.embedding.grad is None


def test_half_maps_are_raised_before_anything_is_computed():
    student, teacher = (o._replace(maps=tuple(m.bfloat16() for m in o.maps)) for o in (STUDENT, TEACHER))
    raised = [o._replace(maps=tuple(m.float() for m in o.maps)) for o in (student, teacher)]
    for preset in ("zoo", "paper", "caffe"):
        assert value(student, teacher, preset=preset) == value(*raised, preset=preset)


def test_autocast_changes_nothing():
    student, teacher = (network(seed=seed, dtype=torch.float32) for seed in (0, 9))
    for preset in ("zoo", "paper", "caffe"):
        expected = value(student, teacher, preset=preset)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert value(student, teacher, preset=preset) == expected


def test_edges_take_and_share_a_pairwise(monkeypatch):
    student, teacher = rand(6, 4), rand(6, 5, seed=1)
    assert irg_edge(Pairwise(student), Pairwise(teacher)) == irg_edge(student, teacher)
    made = []
    original = Pairwise.__init__
    monkeypatch.setattr(Pairwise, "__init__", lambda self, x: (made.append(x.shape), original(self, x))[1])
    objective = Objective([parse_loss("irg:1,mode=all_to_all"), parse_loss("rkd_distance:1")])
    objective(STUDENT, TEACHER, BATCH)
    assert len(made) == 6, "three layers of each network, the embeddings shared with rkd_distance"


def edges(student_layer, teacher_layer, pooled=False, **options):
    def feature(output, layer):
        if layer == "embedding":
            return output.embedding
        return output.maps[layer].mean((2, 3)) if pooled else output.maps[layer]

    return irg_edge(feature(STUDENT, student_layer), feature(TEACHER, teacher_layer), **options)


EDGE = {"vertex": 0, "edge": 1, "transformation": 0}
STEP = {"vertex": 0, "edge": 0, "transformation": 1}


def test_default_layers_are_the_last_two_stages_of_each_network_and_the_embedding():
    expected = (edges(2, 3) + edges(3, 4) + edges("embedding", "embedding")) / 3
    assert_close(value(**EDGE), expected)
    step = irg_transformation(STUDENT.maps[2:], TEACHER.maps[3:])
    assert_close(value(**STEP), step)
    total = 0.1 * irg_vertex(STUDENT.logits, TEACHER.logits) + 5 * expected + 5 * step
    assert_close(value(), total)


def test_one_to_one_with_explicit_lists():
    both = value(**EDGE, student_layers="1/3")
    assert_close(both, (edges(1, 1) + edges(3, 3)) / 2)
    assert_close(value(**EDGE, teacher_layers="1/3"), both)
    own = value(**EDGE, student_layers="1/embedding", teacher_layers="4/2", feature="pooled", reduction="sum")
    expected = edges(1, 4, pooled=True, reduction="sum") + edges("embedding", 2, pooled=True, reduction="sum")
    assert_close(own, expected)


def test_one_to_all_is_a_sum_over_the_layers_of_the_student():
    expected = edges(2, 4) + edges(3, 4) + edges("embedding", 4)
    assert_close(value(**EDGE, mode="one_to_all"), expected)
    named = value(**EDGE, mode="one_to_all", student_layers="0/1", teacher_layers="embedding")
    assert_close(named, edges(0, "embedding") + edges(1, "embedding"))


def test_all_to_all_is_a_sum_over_all_pairs():
    expected = sum(edges(s, t) for s in (1, 2, "embedding") for t in (3, "embedding"))
    named = value(**EDGE, mode="all_to_all", student_layers="1/2/embedding", teacher_layers="3/embedding")
    assert_close(named, expected)


def test_steps_of_each_network_in_order():
    def step(ours, theirs):
        return irg_transformation([STUDENT.maps[k] for k in ours], [TEACHER.maps[k] for k in theirs])

    assert_close(value(**STEP, transformation_layers="0-1/1-2"), (step((0, 1), (0, 1)) + step((1, 2), (1, 2))) / 2)
    own = value(**STEP, transformation_layers="0-2", teacher_transformation_layers="3-4", reduction="caffe")
    pairs = ([STUDENT.maps[0], STUDENT.maps[2]], [TEACHER.maps[3], TEACHER.maps[4]])
    assert_close(own, irg_transformation(*pairs, reduction="caffe"))
    student, teacher = (o._replace(embedding=rand(6, 8, seed=1)) for o in (STUDENT, TEACHER))
    assert value(student, teacher, **STEP, transformation_layers="3-embedding") > 0


def test_preset_paper():
    ours = term(preset="paper")
    assert (ours.vertex, ours.edge, ours.transformation) == (1e-4, 1e-4, 0.01)
    parts = [irg_vertex(STUDENT.logits, TEACHER.logits, reduction="sum")]
    parts.append(sum(edges(layer, 4, pooled=True, reduction="sum") for layer in (1, 2, 3)))
    pooled = [[m.mean((2, 3)) for m in output.maps] for output in (STUDENT, TEACHER)]
    steps = ((0, 1, 1, 2), (1, 2, 2, 3), (2, 3, 3, 4))
    moved = [
        irg_transformation((pooled[0][a], pooled[0][b]), (pooled[1][c], pooled[1][d]), reduction="sum")
        for a, b, c, d in steps
    ]
    parts.append(sum(moved))
    assert_close(ours(STUDENT, TEACHER, BATCH), 1e-4 * parts[0] + 1e-4 * parts[1] + 0.01 * parts[2])


def test_presets_of_the_two_caffe_nets():
    student = STUDENT._replace(maps=tuple(m.clone().requires_grad_() for m in STUDENT.maps))
    loss = value(student, preset="caffe")
    pooled = [output.maps[-1].mean((2, 3)) for output in (STUDENT, TEACHER)]
    assert_close(loss, 0.005 * irg_edge(*pooled, reduction="sum") / 12)
    loss.backward()
    exact = STUDENT.maps[-1].clone().requires_grad_()
    (0.005 * irg_edge(exact.mean((2, 3)), pooled[1], reduction="caffe", detach_max=True)).backward()
    assert_close(student.maps[-1].grad, exact.grad / 2)
    assert student.maps[-2].grad is None
    assert term(preset="caffe").needs == ("maps",) == term(preset="caffe_transformation").needs
    expected = value(**STEP, feature="pooled", reduction="caffe", transformation_layers="0-1/1-2/2-3",
                     teacher_transformation_layers="1-2/2-3/3-4")  # fmt: skip
    assert_close(value(preset="caffe_transformation"), 0.005 * expected)


def test_what_is_given_overrides_the_preset():
    assert term(preset="paper", vertex=0.1).vertex == 0.1  # also where it equals the usual default
    assert term(preset="caffe", transformation=0.005, edge=0.0).needs == ("maps",)
    ours = term(preset="paper", mode="one_to_one", feature="flat", reduction="mean", student_layers="2/3")
    assert (ours.pooled, ours.reduction, ours.layer_pairs) == (False, "mean", [(2, 2), (3, 3)])
    assert term(caffe=True).reduction == "caffe" and term(caffe=True, reduction="sum").reduction == "sum"
    assert term(caffe=True, reduction="sum").detach_max
    parsed = parse_loss("irg:1,preset=paper,vertex=0,student_layers=2,transformation_layers=1-2/2-3")
    ours = TERMS["irg"](**parsed.options)
    assert ours.needs == ("maps",) and ours.layer_pairs == [(2, -1)] and len(ours.step_pairs) == 2


def test_options_narrow_the_needs():
    assert TERMS["irg"].needs == ("maps", "embedding", "logits")
    assert term().needs == ("embedding", "logits", "maps")
    assert term(vertex=0).needs == ("embedding", "maps")
    assert term(vertex=0, transformation=0, student_layers="embedding").needs == ("embedding",)
    assert term(vertex_on="embedding", edge=0, transformation=0).needs == ("embedding",)
    assert term(**STEP).needs == ("maps",)


def test_networks_that_only_embed():
    student, teacher = Output(embedding=rand(6, 4)), Output(embedding=rand(6, 4, seed=1))
    options = {"student_layers": "embedding", "transformation": 0, "vertex": 2.0, "vertex_on": "embedding"}
    loss = value(student, teacher, **options)
    expected = 5 * irg_edge(student.embedding, teacher.embedding)
    assert_close(loss, expected + 2 * irg_vertex(student.embedding, teacher.embedding))


def test_no_gradient_reaches_the_teacher():
    leaves = [m.clone().requires_grad_() for m in TEACHER.maps]
    teacher = Output(maps=tuple(leaves), embedding=TEACHER.embedding.clone().requires_grad_(),
                     logits=TEACHER.logits.clone().requires_grad_())  # fmt: skip
    maps = tuple(m.clone().requires_grad_() for m in STUDENT.maps)
    value(STUDENT._replace(maps=maps), teacher).backward()
    assert maps[-1].grad.any() and all(leaf.grad is None for leaf in (*leaves, teacher.embedding, teacher.logits))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "papr"}, "did you mean 'paper'"),
        ({"mode": "one_to_al"}, "did you mean 'one_to_all'"),
        ({"feature": "pool"}, "did you mean 'pooled'"),
        ({"reduction": "men"}, "did you mean 'mean'"),
        ({"vertex_on": "logit"}, "did you mean 'logits'"),
        ({"vertex": -1.0}, "weights of 0 or more; vertex is -1"),
        ({"edge": float("nan")}, "weights of 0 or more"),
        ({"vertex": 0, "edge": 0, "transformation": 0}, "compares nothing"),
        ({"student_layers": "1/x"}, "student_layers names layer 'x'"),
        ({"teacher_layers": "1//2"}, "teacher_layers names layer ''"),
        ({"student_layers": "1/2", "teacher_layers": "3"}, "there are 2 and 1"),
        ({"mode": "one_to_all", "teacher_layers": "1/2"}, "takes one layer of the teacher"),
        ({"transformation_layers": "1/2"}, "names no pairs"),
        ({"transformation_layers": "1-b"}, "names layer 'b'"),
        ({"transformation_layers": "1-2", "teacher_transformation_layers": "1-2/2-3"}, "there are 1 and 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        term(**options)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (STUDENT, TEACHER, {"student_layers": "4"}, "stage 4, but the student has maps 0 to 3"),
        (STUDENT, TEACHER, {"student_layers": "1", "teacher_layers": "5"}, "the teacher has maps 0 to 4"),
        (STUDENT._replace(maps=None), TEACHER, {}, "the student gives no maps"),
        (STUDENT._replace(maps=STUDENT.maps[:1]), TEACHER, {}, "the last stage but 1, but the student has maps 0 to 0"),
        (STUDENT, TEACHER._replace(embedding=None), {}, "the teacher does not give"),
        (STUDENT, TEACHER._replace(logits=None), {}, "vertex=0"),
        (STUDENT, TEACHER._replace(logits=rand(6, 4)), {}, "rows of one width"),
        (STUDENT, TEACHER, {"vertex_on": "embedding"}, "rows of one width"),
        (network((4, 4, 8, 12)), TEACHER, {}, "between 8 and 12 channels"),
    ],
)
def test_what_cannot_be_compared_is_refused_when_it_is_built(student, teacher, options, message):
    with pytest.raises(UserError, match=message):
        term(**options).build(student, teacher, 3)
