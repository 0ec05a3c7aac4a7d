import pytest
import torch
from pinned import arrays, assert_close, case
from torch.autograd import gradcheck
from torch.nn import functional as F

from metric_kd.distill.feature.ft import Paraphraser, Translator
from metric_kd.errors import UserError
from metric_kd.functional import ab, fsp, ft
from metric_kd.losses.objective import parse_loss
from metric_kd.losses.term import TERMS, Stage
from metric_kd.types import Batch, Output

BATCH = Batch(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.arange(2))


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


def total(*tensors):
    return [t.grad.abs().sum().item() for t in tensors]


@pytest.mark.parametrize("name", ["zoo_fsp_same", "zoo_fsp_pool", "rep_fsp_pool"])
def test_fsp_golden(name):
    pinned = case(name, family="zoo")
    s1, s2, t1, t2 = (pinned.inputs[key] for key in ("s1", "s2", "t1", "t2"))
    loss = fsp((s1.requires_grad_(), s2.requires_grad_()), (t1, t2))
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    if "grad_s1" in pinned.outputs:
        assert_close(s1.grad, pinned.outputs["grad_s1"])
        assert_close(s2.grad, pinned.outputs["grad_s2"])
    else:
        assert total(s1, s2) == pytest.approx(list(pinned.outputs["grad_abs_sum"].values()), rel=1e-9)


def test_fsp_golden_of_the_second_reference():
    """It adds the pairs up where our term averages."""
    a = arrays("zoo_fsp")
    student = [a[f"in_s{i}"].requires_grad_() for i in range(3)]
    loss = sum(fsp((student[i], student[i + 1]), (a[f"t{i}"], a[f"t{i + 1}"])) for i in (0, 1))
    loss.backward()
    assert_close(loss, a["loss"])
    for i in range(3):
        assert_close(student[i].grad, a[f"grad_s{i}"])


@pytest.mark.parametrize("sizes", [((4, 4), (2, 4)), ((2, 4), (4, 4)), ((6, 3), (3, 6)), ((5, 5), (3, 3))])
def test_fsp_oracle_pools_whichever_is_larger(sizes):
    """Every entry of every matrix as a sum over positions; the teacher's grid is another one."""
    pairs = []
    for seed, scale in ((0, 1), (5, 2)):
        first, second = (maps(2, c, *(scale * x for x in s), seed=seed + c) for c, s in zip((3, 4), sizes, strict=True))
        pairs.append((first, second))
    matrices = []
    for first, second in pairs:
        grid = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
        first, second = (F.adaptive_avg_pool2d(m, grid) for m in (first, second))
        g = torch.zeros(2, 3, 4, dtype=torch.float64)
        for n in range(2):
            for i in range(3):
                for j in range(4):
                    g[n, i, j] = sum(
                        first[n, i, y, x] * second[n, j, y, x] for y in range(grid[0]) for x in range(grid[1])
                    )
        matrices.append(g / (grid[0] * grid[1]))
    assert_close(fsp(*pairs), (matrices[0] - matrices[1]).square().mean(), 1e-12)
    assert gradcheck(lambda a, b: fsp((a, b), pairs[1]), tuple(m.requires_grad_() for m in pairs[0]))


@pytest.mark.parametrize("margin", [1, 2])
def test_ab_golden(margin):
    pinned = case(f"zoo_ab_m{margin}", family="zoo")
    s = pinned.inputs["fm_s"].requires_grad_()
    loss = ab(s, pinned.inputs["fm_t"], pinned.hyper["margin"])
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    if "grad_fm_s" in pinned.outputs:
        assert_close(s.grad, pinned.outputs["grad_fm_s"])
    else:
        assert total(s) == pytest.approx(list(pinned.outputs["grad_abs_sum"].values()), rel=1e-9)


def test_ab_golden_of_repdistiller():
    """It sums over a layer's neurons, times 3/1000, and halves the weight from each layer to the one before."""
    pinned = case("rep_ab", family="zoo")
    s = pinned.inputs["fm_s"].requires_grad_()
    loss = ab(s, pinned.inputs["fm_t"], pinned.hyper["margin"]) * s[0].numel() * 3 / 1000
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert total(s) == pytest.approx(list(pinned.outputs["grad_abs_sum"].values()), rel=1e-9)
    a = arrays("zoo_ab")
    student = [a[f"in_s{i}"].requires_grad_() for i in range(3)]
    layers = [ab(x, a[f"t{i}"], 1.0) * x[0].numel() * 3 / 1000 * 2.0 ** (i - 2) for i, x in enumerate(student)]
    sum(layers).backward()
    assert_close(sum(layers), a["loss"])
    for i in range(3):
        assert_close(student[i].grad, a[f"grad_s{i}"])


def test_ab_oracle():
    student, teacher = maps(2, 3, 2, 2), maps(2, 3, 2, 2, seed=1)
    teacher[0, 0, 0, 0] = 0  # on the boundary counts as off
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        expected += (max(0.7 - s, 0) if t > 0 else max(0.7 + s, 0)) ** 2
    assert ab(student, teacher, 0.7).item() == pytest.approx(expected / 24, rel=1e-12)
    assert gradcheck(lambda s: ab(s, teacher, 0.7), student.requires_grad_())
    assert ab(5 * teacher.sign() - 2 * (teacher == 0), teacher, 2.0) == 0


@pytest.mark.parametrize("name", ["fsp", "ab"])
def test_terms_that_initialise_have_a_stage_of_their_own(name):
    term = TERMS[name]()
    assert TERMS[name].acts_in_main is False and term.acts_in_main is False
    assert term.stages() == (Stage(name, share=0.25, epochs=0, lr=0.1, milestones=(0.6, 0.8)),)
    assert term.stages()[0].trains_student and TERMS[name](stage_epochs=7).stages()[0].epochs == 7
    kept = TERMS[name](in_main=True)
    assert kept.acts_in_main is True and kept.stages() == () and TERMS[name].acts_in_main is False
    term.build(STUDENT, TEACHER, 3)
    assert torch.equal(term.stage_forward(name, STUDENT, TEACHER, BATCH), term(STUDENT, TEACHER, BATCH))
    with pytest.raises(UserError, match="stage_epochs=-1"):
        TERMS[name](stage_epochs=-1)


def test_fsp_term():
    term = TERMS["fsp"]()
    term.build(STUDENT, ALIKE, 3)
    assert not list(term.parameters())
    steps = [fsp(STUDENT.maps[i : i + 2], ALIKE.maps[i : i + 2]) for i in range(3)]
    assert torch.allclose(term(STUDENT, ALIKE, BATCH), torch.stack(steps).mean())
    assert term(STUDENT, STUDENT, BATCH) == 0
    chosen = TERMS["fsp"](layers="0/3")
    chosen.build(STUDENT, ALIKE, 3)
    expected = fsp((STUDENT.maps[0], STUDENT.maps[3]), (ALIKE.maps[0], ALIKE.maps[3]))
    assert torch.allclose(chosen(STUDENT, ALIKE, BATCH), expected)
    longer = ALIKE._replace(maps=(maps(2, 3, 8, 8), *ALIKE.maps))
    assert torch.allclose(term(STUDENT, longer, BATCH), torch.stack(steps).mean())


def test_fsp_connectors_only_where_widths_differ():
    term = TERMS["fsp"]()
    term.build(STUDENT, TEACHER, 3)
    assert [tuple(p.shape) for p in term.parameters() if p.ndim == 4] == [(8, 4, 1, 1), (12, 6, 1, 1), (16, 8, 1, 1)]
    term.eval()
    ours = [layer(s) for layer, s in zip(term.connectors, STUDENT.maps, strict=True)]
    steps = [fsp((ours[i], ours[i + 1]), TEACHER.maps[i : i + 2]) for i in range(3)]
    loss = term(STUDENT, TEACHER, BATCH)
    assert torch.allclose(loss, torch.stack(steps).mean())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())


def test_ab_term():
    term = TERMS["ab"](margin=1.0)
    term.build(STUDENT, ALIKE, 3)
    assert not list(term.parameters())
    levels = [ab(s, t, 1.0) for s, t in zip(STUDENT.preacts[1:], ALIKE.preacts[1:], strict=True)]
    assert torch.allclose(term(STUDENT, ALIKE, BATCH), torch.stack(levels).mean())
    other = TERMS["ab"](layers="3")
    other.build(STUDENT, TEACHER, 3)
    assert [tuple(p.shape) for p in other.parameters()] == [(16, 8, 1, 1), (16,), (16,)]
    pooled = F.avg_pool2d(TEACHER.preacts[3], 2)
    assert torch.allclose(other(STUDENT, TEACHER, BATCH), ab(other.connectors[0](STUDENT.preacts[3]), pooled))


def test_ft_golden():
    pinned = case("zoo_ft", family="zoo")
    s = pinned.inputs["factor_s"].requires_grad_()
    loss = ft(s, pinned.inputs["factor_t"])
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert_close(s.grad, pinned.outputs["grad_factor_s"])


def test_ft_golden_of_repdistiller_is_ours_of_attention_maps():
    pinned = case("rep_ft", family="zoo")
    s = pinned.inputs["factor_s"].requires_grad_()
    loss = ft(s.square().mean(1), pinned.inputs["factor_t"].square().mean(1))
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert total(s) == pytest.approx(list(pinned.outputs["grad_abs_sum"].values()), rel=1e-9)
    a = arrays("zoo_ft")
    s = a["in_s1"].requires_grad_()
    loss = ft(s.square().mean(1), a["t1"].square().mean(1))
    loss.backward()
    assert_close(loss, a["loss"])
    assert_close(s.grad, a["grad_s1"])


def test_ft_oracle():
    student, teacher = maps(3, 2, 2, 2), maps(3, 2, 2, 2, seed=1)
    gaps = []
    for s, t in zip(student, teacher, strict=True):
        gaps += (s / s.square().sum().sqrt() - t / t.square().sum().sqrt()).abs().flatten().tolist()
    assert ft(student, teacher).item() == pytest.approx(sum(gaps) / 24, rel=1e-12)
    assert torch.allclose(ft(3 * student, 5 * teacher), ft(student, teacher))  # directions alone count
    assert gradcheck(lambda s: ft(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("norm", ["bn", "nobn"])
def test_paraphraser_and_translator_golden(norm):
    pinned = case(f"zoo_paraphraser_{norm}", family="zoo")
    hyper = pinned.hyper
    options = {"k": hyper["k"], "batch_norm": hyper["use_bn"]}
    para = Paraphraser(hyper["in_channels_t"], **options).double()
    tran = Translator(hyper["in_channels_s"], hyper["in_channels_t"], **options).double()
    for prefix, module in (("para.", para), ("tran.", tran)):
        weights = {k.removeprefix(prefix): v for k, v in pinned.aux.items() if k.startswith(prefix)}
        loaded = module.load_state_dict(weights, strict=True)
        assert not loaded.unexpected_keys and all("num_batches" in key for key in loaded.missing_keys)
    fm_t, fm_s = pinned.inputs["fm_t"], pinned.inputs["fm_s"]
    factor_t, factor_s, rebuilt = para.encoder(fm_t), tran(fm_s), para(fm_t)
    assert_close(factor_t, pinned.outputs["factor_t"])
    assert_close(factor_s, pinned.outputs["factor_s"])
    assert_close(rebuilt, pinned.outputs["rec"])
    assert_close(ft(factor_s, factor_t), pinned.outputs["loss_ft"])
    term = TERMS["ft"](**options)
    term.paraphraser, term.translator = para, tran
    teacher = Output(maps=(fm_t,))
    assert_close(term.stage_forward("ft", None, teacher, BATCH), pinned.outputs["loss_rec"])
    assert_close(term(Output(maps=(fm_s,)), teacher, BATCH), pinned.outputs["loss_ft"])


@pytest.mark.parametrize("norm", ["bn", "nobn"])
def test_parameter_counts(norm):
    for module, name in (
        (Paraphraser(64, 0.5, norm == "bn"), "params_paraphraser_64_.5_"),
        (Translator(64, 64, 0.5, norm == "bn"), "params_translator_64_64_.5_"),
    ):
        assert (
            sum(p.numel() for p in module.parameters()) == case(name + norm, family="zoo").outputs["trainable_params"]
        )


def test_ft_term_declares_its_stage():
    assert TERMS["ft"]().stages() == (
        Stage("ft", share=0.15, epochs=0, lr=0.1, milestones=(), trains_student=False, nesterov=False),
    )
    assert TERMS["ft"](stage_epochs=3).stages()[0].epochs == 3 and TERMS["ft"].acts_in_main


def test_ft_term_trains_one_network_at_a_time():
    torch.manual_seed(0)
    term = TERMS["ft"](batch_norm=True)
    term.build(STUDENT, TEACHER, 3)
    term.train()
    term.enter("ft")
    assert all(p.requires_grad for p in term.paraphraser.parameters())
    assert not any(p.requires_grad for p in term.translator.parameters())
    before = [b.clone() for b in term.paraphraser.buffers()]
    loss = term.stage_forward("ft", None, TEACHER, BATCH)
    assert torch.allclose(loss, F.mse_loss(term.paraphraser(TEACHER.maps[-1]), TEACHER.maps[-1]))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in term.paraphraser.parameters() if p.ndim == 4)
    assert any(not torch.equal(a, b) for a, b in zip(before, term.paraphraser.buffers(), strict=True))

    term.zero_grad()
    term.enter(None)
    term.train()
    assert not any(p.requires_grad for p in term.paraphraser.parameters())
    assert not any(m.training for m in term.paraphraser.modules()) and term.translator.training
    frozen = {k: v.clone() for k, v in term.paraphraser.state_dict().items()}
    term(STUDENT, TEACHER, BATCH).backward()
    assert all(p.grad is None for p in term.paraphraser.parameters())
    assert all(p.grad.abs().sum() > 0 for p in term.translator.parameters() if p.ndim == 4)
    assert all(torch.equal(v, frozen[k]) for k, v in term.paraphraser.state_dict().items())

    term.eval()
    term.enter("ft")  # an evaluation between the stages leaves the mode alone
    assert not term.paraphraser.training
    term.train()
    assert term.paraphraser.training and all(p.requires_grad for p in term.paraphraser.parameters())


def test_ft_reconstruction_is_learnt_and_survives_a_checkpoint():
    torch.manual_seed(0)
    term = TERMS["ft"]()
    term.build(STUDENT, TEACHER, 3)
    term.enter("ft")
    optimiser = torch.optim.SGD([p for p in term.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        losses.append(term.stage_forward("ft", None, TEACHER, BATCH))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    other = TERMS["ft"]()
    other.build(STUDENT, TEACHER, 3)
    other.load_state_dict(term.state_dict())
    other.enter(None)
    assert torch.equal(other(STUDENT, TEACHER, BATCH), term(STUDENT, TEACHER, BATCH))


@pytest.mark.parametrize("flip", [False, True])
def test_ft_term_averages_the_larger_factor_down(flip):
    student, teacher = (TEACHER, STUDENT) if flip else (STUDENT, TEACHER)
    term = TERMS["ft"]()
    term.build(student, teacher, 3)
    ours, theirs = term.translator(student.maps[-1]), term.paraphraser.encoder(teacher.maps[-1])
    if flip:
        ours = F.avg_pool2d(ours, 2)
    else:
        theirs = F.avg_pool2d(theirs, 2)
    assert torch.allclose(term(student, teacher, BATCH), ft(ours, theirs))


def test_dead_huge_and_single_inputs():
    for scale in (0.0, 1e4, 1e-9):
        for n in (1, 2):
            s, t = scale * maps(n, 3, 2, 2, dtype=torch.float32), maps(n, 3, 2, 2, dtype=torch.float32, seed=1)
            for loss_of in (lambda s, t: fsp((s, s), (t, t)), ab, ft):
                x = s.clone().requires_grad_()
                loss = loss_of(x, t)
                loss.backward()
                assert loss.isfinite() and x.grad.isfinite().all()
                assert x.grad.abs().max() < 10 * max(1, scale) ** 3
                assert loss_of(s, torch.zeros_like(t)).isfinite()


@pytest.mark.parametrize("name", ["fsp", "ab", "ft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_and_no_teacher_gradient(name, dtype):
    def lowered(output, scale=1.0):
        fields = {f: tuple((scale * m).to(dtype) for m in getattr(output, f)) for f in ("maps", "preacts")}
        leaves = [m.requires_grad_() for ms in fields.values() for m in ms]
        return Output(**fields), leaves

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
    huge, _ = lowered(STUDENT, 1e3)
    assert term(huge, lowered(TEACHER, 1e3)[0], BATCH).isfinite()


def test_weights_and_descriptions():
    assert [parse_loss(name).weight for name in ("fsp", "ab", "ft")] == [1, 10, 200]
    assert [TERMS[name].needs for name in ("fsp", "ab", "ft")] == [("maps",), ("preacts",), ("maps",)]
    assert all(TERMS[name].paper and TERMS[name].cost for name in ("fsp", "ab", "ft"))


def test_refusals():
    x = maps(2, 3, 2, 2)
    with pytest.raises(UserError, match="fsp compares matrices of one shape"):
        fsp((x, x), (x, x[:, :2]))
    with pytest.raises(UserError, match="same N"):
        fsp((x, x[:1]), (x, x))
    with pytest.raises(UserError, match="ab compares"):
        ab(x, x[:, :2])
    with pytest.raises(UserError, match="ft compares"):
        ft(x, x[:, :2])
    with pytest.raises(UserError, match="two layers"):
        TERMS["fsp"](layers="1").build(STUDENT, TEACHER, 3)
    with pytest.raises(UserError, match="margin of 0 or more"):
        TERMS["ab"](margin=-1.0)
    with pytest.raises(UserError, match="the teacher gives no pre-activations"):
        TERMS["ab"]().build(STUDENT, TEACHER._replace(preacts=None), 3)
    with pytest.raises(UserError, match="k > 0"):
        TERMS["ft"](k=0.0)
    with pytest.raises(UserError, match="k=0.01 leaves no channel"):
        TERMS["ft"](k=0.01).build(STUDENT, TEACHER, 3)
    for name in ("fsp", "ft"):
        with pytest.raises(UserError, match="the student gives no stage maps"):
            TERMS[name]().build(Output(), TEACHER, 3)
