"""Codes, decoders and the stable target: pinned numbers of the reference, and what a plain formula gives."""

import pytest
import torch
from pinned import arrays, assert_close
from torch.nn.functional import cross_entropy, softmax

from metric_kd.distill.granularity import (
    CodedTeacher,
    Coders,
    CodersSpec,
    Decoders,
    Encoders,
    Granularity,
    decoded_embedding,
    decoded_logits,
)
from metric_kd.errors import UserError
from metric_kd.functional import dml, granularity, st, stable_logits
from metric_kd.losses.objective import parse_loss
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch, Output


def encoders(g: dict, owner: str) -> Encoders:
    module = Encoders(g[f"{owner}_ak_encoder_0_weight"].shape[1], 4, 6).double()
    return _load(module, g, owner, "encoder")


def decoders(g: dict, owner: str) -> Decoders:
    module = Decoders(g[f"{owner}_ak_decoder_0_weight"].shape[0], 5, 4, 6).double()
    return _load(module, g, owner, "decoder")


def _load(module, g, owner, part):
    module.load_state_dict(
        {
            f"{branch}.{layer}.{kind}": g[f"{owner}_{short}_{part}_{layer}_{kind}"]
            for branch, short in (("abstract", "ak"), ("detailed", "dk"))
            for layer in (0, 2)
            for kind in ("weight", "bias")
        }
    )
    return module


@pytest.mark.parametrize("variant", ["mag", "mas"])
def test_the_whole_objective_equals_the_reference(variant):
    g = arrays("mgd_wrapper")
    feature = g["fs"].clone().requires_grad_()
    head = g["S_backbone_fc_weight"].clone().requires_grad_()
    student, teacher, reader = encoders(g, "S"), encoders(g, "T"), decoders(g, "T")
    logits = feature @ head.T + g["S_backbone_fc_bias"]
    codes, taught = student(feature), teacher(g["ft"])
    decoded = reader(taught)
    for name, value in (
        ("s_out", logits), ("s_ak_enc", codes[0]), ("s_dk_enc", codes[1]), ("t_ak_enc", taught[0]),
        ("t_dk_enc", taught[1]), ("t_ak_dec", decoded[0]), ("t_dk_dec", decoded[1]),
    ):  # fmt: skip
        assert_close(value, g[name])
    stable = stable_logits(g["t_out"], *decoded)
    assert_close(stable, g["stable_out"])
    assert_close(granularity(codes, taught, detailed=0), g["ak"])
    assert_close(granularity(codes, taught, abstract=0), g["dk"])
    target, named = (g["t_out"], "div") if variant == "mag" else (stable, "div_stable")
    soft = st(logits, target, 4.0)
    assert_close(soft, g[named])
    total = cross_entropy(logits, g["labels"]) + 0.8 * soft + granularity(codes, taught)
    assert_close(total, g[variant])
    total.backward()
    assert_close(feature.grad, g[f"{variant}_grad_fs"])
    assert_close(head.grad, g[f"{variant}_grad_S_fc_w"])
    if variant == "mag":
        assert_close(student.abstract[0].weight.grad, g["mag_grad_S_ak_enc0_w"])
        assert_close(student.detailed[2].weight.grad, g["mag_grad_S_dk_enc2_w"])
    assert all(p.grad is None for p in teacher.parameters()), "no gradient reaches the teacher's codes"


def test_fitting_equals_the_reference():
    g, weights = arrays("mgd_teacher_wrapper_loss"), arrays("mgd_wrapper")
    encode, decode = encoders(weights, "T"), decoders(weights, "T")
    decoded = decode(encode(g["ft"]))
    teacher = weights["t_out"].clone().requires_grad_()
    losses = [decoded_logits(y, teacher, g["labels"], tau) for y, tau in zip(decoded, (2.0, 8.0), strict=True)]
    assert_close(losses[0], g["loss_ak"])
    assert_close(losses[1], g["loss_dk"])
    (losses[0] + losses[1]).backward()
    assert_close(encode.abstract[0].weight.grad, g["grad_ak_enc0_w"])
    assert_close(decode.abstract[2].bias.grad, g["grad_ak_dec2_b"])
    assert_close(encode.detailed[0].weight.grad, g["grad_dk_enc0_w"])
    assert_close(decode.detailed[2].bias.grad, g["grad_dk_dec2_b"])
    assert teacher.grad is None


@pytest.mark.parametrize("form", ["fixed", "ref"])
def test_peers_equal_the_reference(form):
    g = arrays("mgd_mdp_dml")
    own = [g[key].clone().requires_grad_() for key in ("o1", "a1", "d1")]
    logits, *codes = own
    elementwise = form == "ref"
    total = cross_entropy(logits, g["labels"]) + dml(logits, g["o2"], elementwise)
    total = total + granularity(tuple(codes), (g["a2"], g["d2"]), elementwise=elementwise)
    assert_close(total, g[f"loss_{form}"])
    total.backward()
    for name, tensor in zip(("o1", "a1", "d1"), own, strict=True):
        assert_close(tensor.grad, g[f"{form}_grad_{name}"])


def test_codes_against_the_formula_written_out():
    torch.manual_seed(0)
    ours = (torch.randn(5, 4, dtype=torch.double), torch.randn(5, 6, dtype=torch.double))
    theirs = tuple(torch.randn_like(code) for code in ours)
    wanted = 0.0
    for s, t, tau, weight in zip(ours, theirs, (2, 8), (0.5, 3.0), strict=True):
        for n in range(5):
            p, q = softmax(t[n] / tau, 0), softmax(s[n] / tau, 0)
            wanted += weight * tau**2 * sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p))) / 5
    assert granularity(ours, theirs, 0.5, 3.0).item() == pytest.approx(float(wanted), rel=1e-12)


def test_codes_are_safe_and_checked():
    far = (torch.full((2, 4), 1e4, dtype=torch.half), torch.randn(2, 6).half())
    ours = tuple((-code).requires_grad_() for code in far)
    loss = granularity(ours, far)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(torch.isfinite(code.grad).all() for code in ours)
    with pytest.raises(UserError, match="codes of one length"):
        granularity((torch.zeros(2, 4), torch.zeros(2, 6)), (torch.zeros(2, 4), torch.zeros(2, 5)))
    with pytest.raises(UserError, match="fit its coders"):
        Granularity().build(Output(pooled=torch.zeros(2, 3)), Output(pooled=torch.zeros(2, 3)), 3)


def test_the_gap_of_an_embedding_is_free_of_scale():
    torch.manual_seed(0)
    y, t = torch.randn(4, 3, dtype=torch.double, requires_grad=True), torch.randn(4, 3, dtype=torch.double)
    gap = decoded_embedding(y, t)
    wanted = sum(((y[n] - t[n]) ** 2).sum() for n in range(4)) / sum((t[n] ** 2).sum() for n in range(4))
    assert gap.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert decoded_embedding(5 * y, 5 * t).item() == pytest.approx(gap.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: decoded_embedding(x, t), y)
    assert decoded_embedding(y, torch.zeros_like(t)).isfinite()


def test_a_coded_teacher_is_a_teacher_with_codes():
    torch.manual_seed(0)
    network = build_network(NetworkSpec("resnet8_x0.25", 0, False, num_classes=5)).eval()
    coders = Coders(CodersSpec(network.pooled_size, 5, abstract=3, detailed=7))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mag, mas = CodedTeacher(network, coders), CodedTeacher(network, coders, stable=True)
    plain = network(images, want=("pooled", "logits"))
    assert torch.equal(mag(images, want=("logits",)).logits, plain.logits)
    output = mas(images, want=("codes", "logits"))
    assert output.pooled is None and [code.shape[1] for code in output.codes] == [3, 7]
    decoded = coders(plain.pooled)
    torch.testing.assert_close(output.logits, (plain.logits + decoded[0] + decoded[1]) / 3)
    assert mas(images, want=("pooled",)).codes is None
    assert not any(p.requires_grad for p in mas.parameters()) and not mas.training
    assert torch.equal(mag.rgb_scale, network.rgb_scale)
    with pytest.raises(UserError, match="mag"):
        CodedTeacher(
            build_network(NetworkSpec("resnet8_x0.25", 8)), Coders(CodersSpec(16, 8, "embedding")), stable=True
        )
    with pytest.raises(UserError, match="fit them to this teacher"):
        CodedTeacher(network, Coders(CodersSpec(99, 5)))


def test_the_term_owns_encoders_of_the_teachers_dimensions():
    term = Granularity(**parse_loss("granularity:2,abstract=0.5").options)
    torch.manual_seed(0)
    teacher = Output(codes=(torch.randn(4, 3), torch.randn(4, 7)))
    student = Output(pooled=torch.randn(4, 9, requires_grad=True))
    term.build(student, teacher, 5)
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long), torch.arange(4))
    loss = term(student, teacher, batch)
    assert loss.item() == pytest.approx(granularity(term.encoders(student.pooled), teacher.codes, 0.5).item())
    loss.backward()
    assert student.pooled.grad.abs().sum() > 0 and all(p.grad is not None for p in term.parameters())
    assert sum(p.numel() for p in Encoders(64).parameters()) == 29_120
    both = Coders(CodersSpec(64, 100))
    assert sum(p.numel() for p in both.parameters()) == 62_728
