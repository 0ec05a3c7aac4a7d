"""Sobolev and LwM: golden values on a tiny network, slow oracles, second derivatives through batch normalisation."""

import pytest
import torch
from pinned import assert_close, case
from torch import nn
from torch.autograd import gradcheck

from metric_kd.distill.feature.lwm import class_attention, lwm
from metric_kd.distill.logit.sobolev import input_gradient, sobolev
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch, Output


def tiny(aux, who, images):
    """(middle map, logits) of the network of the golden cases."""
    w = {key.removeprefix(f"{who}_"): value for key, value in aux.items() if key.startswith(f"{who}_")}
    x = nn.functional.conv2d(images, w["w1"], padding=1).relu()
    middle = nn.functional.conv2d(x, w["w2"], stride=2, padding=1).relu()
    last = nn.functional.conv2d(middle, w["w3"], padding=1).relu()
    return middle, last.mean((2, 3)) @ w["fw"].T + w["fb"]


def both(pinned):
    """Outputs of student and teacher whose last but one map is the middle one, and the batch."""
    images = pinned.inputs["img"].requires_grad_()
    for key, value in pinned.aux.items():
        value.requires_grad_(key.startswith("s_"))
    outputs = []
    for who in "st":
        middle, logits = tiny(pinned.aux, who, images)
        outputs.append(Output(maps=(middle.detach(), middle, middle.detach()), logits=logits))
    return *outputs, Batch(images, pinned.inputs["target"], torch.arange(len(images)))


@pytest.mark.parametrize(
    "name, term",
    [
        ("zoo_sobolev", TERMS["sobolev"]()),
        ("zoo_lwm", TERMS["lwm"](form="zoo")),
        ("zoo_lwm", TERMS["lwm"](form="zoo", layer="1")),
        ("own_lwm_gradcam_fixed", TERMS["lwm"]()),
    ],
)
def test_golden(name, term):
    pinned = case(name, family="zoo")
    loss = term(*both(pinned))
    assert_close(loss, pinned.outputs["loss"])
    loss.backward()
    graded = [key for key in pinned.outputs if key.startswith("grad_")]
    for key in graded:
        assert_close(pinned.aux[key.removeprefix("grad_")].grad, pinned.outputs[key])
    assert bool(graded) == name.startswith("zoo")
    assert all(pinned.aux[key].grad is None for key in pinned.aux if key.startswith("t_"))
    if name == "zoo_lwm":  # the reference's form teaches nothing below the tapped layer
        assert pinned.aux["s_w1"].grad is None or not pinned.aux["s_w1"].grad.any()
    else:
        assert pinned.aux["s_w1"].grad.any()


def test_golden_logits():
    pinned = case("zoo_sobolev", family="zoo")
    student, teacher, _ = both(pinned)
    assert_close(student.logits, pinned.outputs["out_s"])
    assert_close(teacher.logits, pinned.outputs["out_t"])


def test_input_gradient_oracle():
    pinned = case("zoo_sobolev", family="zoo")
    images, labels = pinned.inputs.values()
    student, _, batch = both(pinned)
    gradient = input_gradient(student.logits, labels, batch.images)
    for n, place in ((0, (0, 1, 2)), (3, (2, 7, 0)), (7, (1, 4, 4))):
        ends = []
        for sign in (1, -1):
            shifted = images.detach().clone()
            shifted[(n, *place)] += sign * 1e-6
            ends.append(tiny(pinned.aux, "s", shifted)[1][n, labels[n]])
        assert gradient[(n, *place)].item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), rel=1e-5)
    assert not gradient.requires_grad and input_gradient(student.logits, labels, images, True).requires_grad


def test_class_attention_oracle():
    pinned = case("zoo_lwm", family="zoo")
    images, labels = pinned.inputs["img"].requires_grad_(), pinned.inputs["target"]
    maps, logits = tiny(pinned.aux, "s", images)
    for form in ("grad_cam", "zoo"):
        attention = class_attention(logits, labels, maps, form)
        for n in (0, 5):
            (slope,) = torch.autograd.grad(logits[n, labels[n]], maps, retain_graph=True)
            wanted = torch.zeros(maps.shape[2:], dtype=torch.float64)
            for c in range(maps.shape[1]):
                wanted += slope[n, c].mean() * (maps if form == "grad_cam" else slope)[n, c]
            assert_close(attention[n], wanted.clamp(min=0).detach())


def rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sobolev_is_the_gap_of_directions():
    ours, theirs = rows(4, 3, 2, 2), rows(4, 3, 2, 2, seed=1)
    wanted = sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(ours, theirs, strict=True)) / ours.numel()
    assert_close(sobolev(ours, theirs), wanted)
    assert sobolev(ours, 5 * ours) < 1e-30
    assert gradcheck(lambda s: sobolev(s, theirs), ours.requires_grad_())


@pytest.mark.parametrize("size", [4, 2, 8])
def test_lwm_pools_the_larger_grid(size):
    ours, theirs = rows(3, 4, 4).abs(), rows(3, size, size, seed=1).abs()
    grid, total = min(4, size), 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = (nn.functional.adaptive_avg_pool2d(x[None], grid)[0] for x in (a, b))
        total += (a / a.norm() - b / b.norm()).abs().sum() / (3 * grid * grid)
    assert_close(lwm(ours, theirs), total)
    assert gradcheck(lambda s: lwm(s, theirs), ours.requires_grad_())


@pytest.mark.parametrize("loss", [sobolev, lwm])
def test_zero_rows_pass_nothing_on(loss):
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        ours = rows(3, 4, 4).abs().to(dtype)
        ours[1] = 0
        theirs = rows(3, 4, 4, seed=1).to(dtype).requires_grad_()
        value = loss(ours.requires_grad_(), theirs)
        value.backward()
        assert value.isfinite() and ours.grad.isfinite().all() and not ours.grad[1].any() and ours.grad[0].any()
        assert theirs.grad is None and value.dtype == (dtype if dtype == torch.float64 else torch.float32)


TERMS_HERE = [TERMS["sobolev"](), TERMS["lwm"](), TERMS["lwm"](layer="1"), TERMS["lwm"](form="zoo")]


def networks(student="resnet8", teacher="resnet14"):
    torch.manual_seed(0)
    ours, theirs = (
        build_network(NetworkSpec(f"{base}_x0.25", embedding_size=0, l2normalize=False, num_classes=5))
        for base in (student, teacher)
    )
    theirs.eval().requires_grad_(False)
    images = torch.randint(256, (6, 3, 16, 16)).float().requires_grad_()
    return ours.train(), theirs, Batch(images, torch.arange(6) % 5, torch.arange(6))


def evaluate(term, student, teacher, batch):
    want = ("maps", "logits")
    return term(student(batch.images, want=want), teacher(batch.images, want=want), batch)


@pytest.mark.parametrize("term", TERMS_HERE, ids=str)
def test_second_derivatives_through_batch_normalisation(term):
    """The gradient of the loss with respect to the weights, against finite differences, in training mode."""
    student, teacher, batch = networks()
    student.double(), teacher.double()
    batch = batch._replace(images=batch.images.detach().double().requires_grad_())
    weights = [p for p in student.parameters() if p.ndim == 4]
    loss = evaluate(term, student, teacher, batch)
    slopes = torch.autograd.grad(loss, weights, allow_unused=True)
    slopes = [torch.zeros_like(w) if s is None else s for s, w in zip(slopes, weights, strict=True)]
    torch.manual_seed(1)
    ways = [torch.randn_like(w) for w in weights]
    wanted = sum((s * d).sum() for s, d in zip(slopes, ways, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, d in zip(weights, ways, strict=True):
                w += sign * 1e-7 * d
        ends.append(evaluate(term, student, teacher, batch).detach())
        with torch.no_grad():
            for w, d in zip(weights, ways, strict=True):
                w -= sign * 1e-7 * d
    assert wanted.abs() > 1e-6
    assert ((ends[0] - ends[1]) / 2e-7).item() == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.parametrize("term", TERMS_HERE, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_autocast(term, dtype):
    student, teacher, batch = networks()
    full = evaluate(term, student, teacher, batch)
    want = ("maps", "logits")
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = student(batch.images, want=want), teacher(batch.images, want=want)
    loss = term(ours, theirs, batch)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.allclose(loss, full, rtol=0.5, atol=1e-3)
    slopes = [p.grad for p in student.parameters() if p.grad is not None]
    assert slopes and all(s.isfinite().all() for s in slopes) and any(s.any() for s in slopes)
    assert all(p.grad is None for p in teacher.parameters())


def test_two_terms_share_the_same_outputs():
    student, teacher, batch = networks()
    want = ("maps", "logits")
    ours, theirs = student(batch.images, want=want), teacher(batch.images, want=want)
    total = sum(term(ours, theirs, batch) for term in TERMS_HERE) + ours.logits.logsumexp(1).mean()
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("term", TERMS_HERE, ids=str)
def test_a_copy_of_the_teacher_has_nothing_to_learn_and_one_image_is_enough(term):
    student, _, batch = networks()
    student.eval()
    one = batch._replace(images=batch.images[:1].detach().requires_grad_(), labels=batch.labels[:1])
    loss = evaluate(term, student, student, one)
    loss.backward()
    assert loss.abs() < 1e-6 and all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_declarations_and_refusals():
    student, teacher, batch = networks()
    for term in TERMS_HERE:
        assert term.differentiates and term.reads_teacher and term.paper
    with pytest.raises(UserError, match="must see one size"):
        evaluate(TERMS["sobolev"](), student, teacher, batch._replace(teacher_images=batch.images))
    with pytest.raises(UserError, match="one stage"):
        TERMS["lwm"](layer="1/2")
    with pytest.raises(UserError, match="stage 7, but the student has maps 0 to 3"):
        TERMS["lwm"](layer="7").build(*(n(batch.images, want=("maps",)) for n in (student, teacher)), 5)
    with pytest.raises(UserError, match="did you mean 'grad_cam'"):
        TERMS["lwm"](form="gradcam")
    with pytest.raises(UserError, match="gradients of the same images"):
        sobolev(rows(2, 3), rows(2, 4))
    with pytest.raises(UserError, match="attention \\(N, H, W\\)"):
        lwm(rows(2, 3), rows(2, 3))
    TERMS["lwm"]().build(*(n(batch.images, want=("maps",)) for n in (student, teacher)), 5)
