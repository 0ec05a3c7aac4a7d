import math

import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck
from torch.nn import functional as F

from metric_kd.errors import UserError
from metric_kd.functional import afd, bn_margin, ofd, ofd_margin, vid
from metric_kd.losses.objective import parse_loss
from metric_kd.losses.term import TERMS
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))
NAMES = ("ofd", "vid", "afd")


def maps(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def network(widths, sizes, seed=0, n=2):
    pre = tuple(
        maps(n, c, s, s, dtype=torch.float32, seed=seed + i) for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
    )
    return Output(maps=tuple(m.relu() for m in pre), preacts=pre)


STUDENT = network((4, 4, 6, 8), (8, 8, 4, 2))
TEACHER = network((4, 8, 12, 16), (8, 8, 8, 4), seed=9)
ALIKE = network((4, 4, 6, 8), (8, 8, 4, 2), seed=20)


def built(name, student, teacher, **options):
    term = TERMS[name](**options)
    term.build(Output(maps=(student,), preacts=(student,)), Output(maps=(teacher,), preacts=(teacher,)), 3)
    return term.double()


def level(term, student, teacher):
    return term(Output(maps=(student,), preacts=(student,)), Output(maps=(teacher,), preacts=(teacher,)), BATCH)


def test_ofd_golden():
    """To 1e-7: the reference counts the negatives in float32."""
    pinned = case("zoo_ofd_train", family="zoo")
    s, t = pinned.inputs["fm_s"].requires_grad_(), pinned.inputs["fm_t"]
    term = built("ofd", s, t)
    conv, norm = term.connectors[0]
    conv.weight.data.copy_(pinned.aux["conv"])
    norm.weight.data.copy_(pinned.aux["bn_w"])
    norm.bias.data.copy_(pinned.aux["bn_b"])
    assert_close(ofd_margin(t), pinned.outputs["margin"].flatten(), 1e-7)
    loss = level(term, s, t)
    loss.backward()
    assert_close(loss, pinned.outputs["loss"], 1e-7)
    assert_close(s.grad, pinned.outputs["grad_fm_s"], 1e-7)
    assert_close(conv.weight.grad, pinned.outputs["grad_conv"], 1e-7)
    assert_close(norm.weight.grad, pinned.outputs["grad_bn_w"], 1e-7)


def test_ofd_golden_of_mdistiller():
    """It sums over C, H and W where ours averages."""
    pinned = case("mdist_ofd_feat_loss", family="zoo")
    s = pinned.inputs["fm_s"].requires_grad_()
    loss = ofd(s, pinned.inputs["fm_t"], pinned.aux["margin"].flatten()) * s[0].numel()
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    (expected,) = pinned.outputs["grad_abs_sum"].values()
    assert s.grad.abs().sum().item() == pytest.approx(expected, rel=1e-9)


def test_bn_margin_golden_and_edges():
    pinned = case("mdist_ofd_bn_margin", family="zoo")
    assert_close(bn_margin(pinned.inputs["bn_weight"], pinned.inputs["bn_bias"]), pinned.outputs["margin"])
    weight = torch.tensor([0.0, 0.0, 0.0, 1.0, -2.0, 1e-30])
    bias = torch.tensor([-1.0, 0.0, 1.0, -1e4, 1.0, 5.0])
    margin = bn_margin(weight, bias)
    assert margin.isfinite().all() and (margin <= 0).all()
    assert margin[0] == -1 and margin[3] == -1e4  # always negative: the plain mean
    draws = 1.0 + 2.0 * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert margin[4].item() == pytest.approx(draws[draws < 0].mean().item(), rel=1e-2)


def test_ofd_oracle():
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    teacher[:, 1:] = teacher[:, 1:].abs()
    teacher[0, 1, 0, 0] *= -1  # one negative in channel 1, none in channel 2
    margin = ofd_margin(teacher)
    expected = 0.0
    for c in range(3):
        negative = [x for x in teacher[:, c].flatten().tolist() if x < 0]
        mean = sum(negative) / len(negative) if negative else 0.0
        assert margin[c].item() == pytest.approx(mean, abs=1e-12)
        for s, t in zip(student[:, c].flatten().tolist(), teacher[:, c].flatten().tolist(), strict=True):
            target = max(t, mean)
            expected += 0.0 if s <= target <= 0 else (s - target) ** 2
    assert ofd(student, teacher, margin).item() == pytest.approx(expected / 24, rel=1e-12)
    assert gradcheck(lambda s: ofd(s, teacher, margin), student.requires_grad_())


@pytest.mark.parametrize("name", ["zoo_vid", "rep_vid"])
def test_vid_golden(name):
    pinned, weights = case(name, family="zoo"), case("zoo_vid", family="zoo")
    s, t = pinned.inputs["fm_s"].requires_grad_(), pinned.inputs["fm_t"]
    term = built("vid", s, t, mid_factor=0.75, eps=pinned.hyper["eps"])
    convs = term.connectors[0][::2]
    assert [tuple(c.weight.shape) for c in convs] == [(12, 16, 1, 1), (12, 12, 1, 1), (16, 12, 1, 1)]
    if name == "zoo_vid":
        assert_close(term.alphas[0], pinned.outputs["alpha_init"], 1e-7)  # built in float32
    for conv, key in zip(convs, ("w1", "w2", "w3"), strict=True):
        conv.weight.data.copy_(weights.aux[key])
    term.alphas[0].data.copy_(weights.aux["alpha"])
    loss = level(term, s, t)
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    if name == "rep_vid":
        (expected,) = pinned.outputs["grad_abs_sum"].values()
        assert s.grad.abs().sum().item() == pytest.approx(expected, rel=1e-9)
        return
    assert_close(s.grad, pinned.outputs["grad_fm_s"])
    assert_close(convs[0].weight.grad, pinned.outputs["grad_w1"])
    assert_close(term.alphas[0].grad, pinned.outputs["grad_alpha"])


def test_vid_golden_of_the_second_reference():
    a = arrays("zoo_vid")
    s = a["in_s1"].requires_grad_()
    term = built("vid", s, a["t"], eps=1e-5)
    for conv, key in zip(term.connectors[0][::2], ("w0", "w2", "w4"), strict=True):
        conv.weight.data.copy_(a[key])
    term.alphas[0].data.copy_(a["log_scale"])
    loss = level(term, s, a["t"])
    loss.backward()
    assert_close(loss, a["loss"])
    assert_close(s.grad, a["grad_s1"])


def test_vid_oracle():
    mean, teacher, variance = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1), torch.tensor([0.3, 1.0, 7.0]).double()
    gaussian = torch.distributions.Normal(mean, variance.sqrt()[:, None, None].expand_as(mean))
    expected = -gaussian.log_prob(teacher).mean() - 0.5 * math.log(2 * math.pi)
    assert_close(vid(mean, teacher, variance), expected, 1e-12)
    assert gradcheck(lambda m, v: vid(m, teacher, v), (mean.requires_grad_(), variance.requires_grad_()))


@pytest.mark.parametrize("init_var", [2e-6, 1e-3, 5.0, 1e3, 1e6])
def test_vid_starts_at_init_var(init_var):
    s, t = maps(2, 3, 2, 2), maps(2, 4, 2, 2, seed=1)
    term = built("vid", s, t, init_var=init_var)
    assert torch.allclose(F.softplus(term.alphas[0]) + 1e-6, torch.full((4,), init_var).double(), rtol=1e-6)
    loss = level(term, s, t)
    loss.backward()
    assert loss.isfinite() and term.alphas[0].grad.isfinite().all()
    term.alphas[0].data.fill_(-1e4)  # the variance stays above eps
    assert level(term, s, t).isfinite()


def test_afd_golden():
    pinned = case("zoo_afd", family="zoo")
    s, t = pinned.inputs["fm_s"].requires_grad_(), pinned.inputs["fm_t"]
    term = built("afd", s, t, att_factor=0.5)
    first, last = term.attentions[0][::2]
    for parameter, key in ((first.weight, "w1"), (first.bias, "b1"), (last.weight, "w2"), (last.bias, "b2")):
        assert parameter.shape == pinned.aux[key].shape
        parameter.data.copy_(pinned.aux[key])
    loss = level(term, s, t)
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert_close(s.grad, pinned.outputs["grad_fm_s"])
    assert_close(first.weight.grad, pinned.outputs["grad_w1"])
    assert_close(last.weight.grad, pinned.outputs["grad_w2"])
    assert_close(last.bias.grad, pinned.outputs["grad_b2"])


def test_afd_golden_of_the_second_reference():
    a = arrays("zoo_afd")
    s = a["in_s1"].requires_grad_()
    term = built("afd", s, a["t1"])
    for layer, key in zip(term.attentions[0][::2], ("0", "2"), strict=True):
        layer.weight.data.copy_(a["w" + key])
        layer.bias.data.copy_(a["b" + key])
    loss = level(term, s, a["t1"])
    loss.backward()
    assert_close(loss, a["loss"])
    assert_close(s.grad, a["grad_s1"])


def test_afd_oracle():
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    attention = maps(2, 3, seed=2).softmax(1)
    expected = 0.0
    for n in range(2):
        for c in range(3):
            s, t = (x[n, c] / (x[n, c].square().sum().sqrt() + 1e-6) for x in (student, teacher))
            expected += attention[n, c] * (s - t).square().mean() / 2
    assert_close(afd(student, teacher, attention), expected, 1e-12)
    dead = torch.zeros_like(student)  # a dead channel counts as zero, so the gap is the teacher's length, 1 / P
    assert afd(dead, teacher, attention).item() == pytest.approx(1 / 4, rel=1e-5)
    assert afd(student, student, attention) == 0
    assert gradcheck(lambda s, a: afd(s, teacher, a), (student.requires_grad_(), attention.requires_grad_()))


@pytest.mark.parametrize("n", [1, 2])
def test_afd_dead_channels_one_image_and_saturated_attention(n):
    s, t = maps(n, 3, 2, 2), maps(n, 3, 2, 2, seed=1)
    s[:, 0] = 0
    s[0, 1] = 1e-9
    t[:, 2] = 0
    s.requires_grad_()
    term = built("afd", s, t)
    term.attentions[0][2].bias.data.fill_(-1e4)  # every sigmoid is zero
    loss = level(term, s, t)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all() and s.grad.abs().max() < 10
    assert (s.grad[:, 0] == 0).all() and (s.grad[0, 1] == 0).all() and s.grad[:, 2].abs().sum() > 0


def test_terms_average_over_stages():
    shapes = {"ofd": "preacts", "vid": "maps", "afd": "maps"}
    for name, field in shapes.items():
        term = TERMS[name]()
        assert term.needs == (field,) and term.acts_in_main and term.stages() == ()
        term.build(STUDENT, TEACHER, 3)
        term.eval()
        levels = []
        for i, (s, t) in enumerate(zip(getattr(STUDENT, field)[1:], getattr(TEACHER, field)[1:], strict=True)):
            t = F.adaptive_avg_pool2d(t, s.shape[2])
            s = term.connectors[i](s)
            if name == "ofd":
                levels.append(ofd(s, t, ofd_margin(t)))
            elif name == "vid":
                levels.append(vid(s, t, F.softplus(term.alphas[i]) + 1e-6))
            else:
                scores = term.attentions[i](t.mean((2, 3), keepdim=True)).flatten(1).sigmoid()
                levels.append(afd(s, t, scores / scores.sum(1, keepdim=True)))
        assert len(levels) == 3
        assert torch.allclose(term(STUDENT, TEACHER, BATCH), torch.stack(levels).mean(), rtol=1e-5)


def test_trained_parts():
    ofd_term, afd_term, vid_term = (TERMS[name](layers="1/3") for name in ("ofd", "afd", "vid"))
    for term in (ofd_term, afd_term, vid_term):
        term.build(STUDENT, ALIKE, 3)
        loss = term(STUDENT, ALIKE, BATCH)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())
    assert [tuple(p.shape) for p in ofd_term.parameters() if p.ndim == 4] == [(4, 4, 1, 1), (8, 8, 1, 1)]
    assert all(isinstance(layer, torch.nn.Identity) for layer in afd_term.connectors)
    assert [tuple(p.shape) for p in afd_term.parameters() if p.ndim == 4] == [(4, 4, 1, 1)] * 2 + [(8, 8, 1, 1)] * 2
    assert [tuple(p.shape) for p in vid_term.alphas] == [(4,), (8,)]
    assert not list(TERMS["ofd"]().parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_no_teacher_gradient(name, dtype):
    def lowered(output, scale=1.0):
        fields = {f: tuple((scale * m).to(dtype) for m in getattr(output, f)) for f in ("maps", "preacts")}
        leaves = [m.requires_grad_() for ms in fields.values() for m in ms]
        return Output(**fields), leaves

    torch.manual_seed(0)
    term = TERMS[name]()
    term.build(STUDENT, TEACHER, 3)
    expected = term(STUDENT, TEACHER, BATCH)
    (student, ours), (teacher, theirs) = lowered(STUDENT), lowered(TEACHER)
    loss = term(student, teacher, BATCH)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=5e-2)
    assert all(m.grad is None for m in theirs)
    assert sum(m.grad.abs().sum() for m in ours if m.grad is not None) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = term(STUDENT, TEACHER, BATCH)
    assert under.dtype == torch.float32 and torch.allclose(under, expected, rtol=5e-2)
    assert term(lowered(STUDENT, 1e3)[0], lowered(TEACHER, 1e3)[0], BATCH).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_one_image_and_dead_networks(name):
    def cut(output, scale):
        return Output(*(tuple((scale * m[:1]).requires_grad_() for m in ms) for ms in output[:2]))

    for ours in (0.0, 1.0, 1e4):
        for theirs in (0.0, 1e4):
            student, teacher = cut(STUDENT, ours), cut(TEACHER, theirs)
            term = TERMS[name]()
            term.build(student, teacher, 3)
            loss = term(student, teacher, BATCH)
            loss.backward()
            leaves = [m for ms in student[:2] for m in ms if m.grad is not None]
            assert leaves and loss.isfinite() and all(m.grad.isfinite().all() for m in leaves)


def test_weights_and_descriptions():
    assert [parse_loss(name).weight for name in NAMES] == [0.5, 1, 500]
    assert all(TERMS[name].paper and TERMS[name].cost and TERMS[name].family == "feature" for name in NAMES)


def test_refusals():
    x = maps(2, 3, 2, 2)
    for loss in (ofd, vid):
        with pytest.raises(UserError, match="one (margin|variance) per channel"):
            loss(x, x, torch.ones(2))
        with pytest.raises(UserError, match="of one shape"):
            loss(x, x[:, :2], torch.ones(3))
    with pytest.raises(UserError, match="of one shape"):
        afd(x, x[:, :, :1], torch.ones(2, 3))
    with pytest.raises(UserError, match="one weight per image"):
        afd(x, x, torch.ones(3))
    for options in ({"init_var": 1e-6}, {"init_var": 0.0}, {"eps": 0.0}, {"mid_factor": 0.0}, {"init_var": math.inf}):
        with pytest.raises(UserError, match="init_var"):
            TERMS["vid"](**options)
    with pytest.raises(UserError, match="leaves no channel"):
        TERMS["vid"](mid_factor=0.01).build(STUDENT, TEACHER, 3)
    with pytest.raises(UserError, match="att_factor > 0"):
        TERMS["afd"](att_factor=0.0)
    with pytest.raises(UserError, match="eps > 0"):
        TERMS["afd"](eps=0.0)
    with pytest.raises(UserError, match="no hidden unit"):
        TERMS["afd"](att_factor=0.01).build(STUDENT, TEACHER, 3)
    with pytest.raises(UserError, match="the student gives no pre-activations"):
        TERMS["ofd"]().build(STUDENT._replace(preacts=None), TEACHER, 3)
    with pytest.raises(UserError, match="stage 4, but the student has maps 0 to 3"):
        TERMS["vid"](layers="4").build(STUDENT, TEACHER, 3)
