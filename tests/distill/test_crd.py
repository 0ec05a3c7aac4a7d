"""CRD: golden values over two calls, a slow oracle, the draws, the memory, bounded memory use."""

import math

import pytest
import torch
from pinned import assert_close, case
from torch import nn
from torch.autograd import gradcheck

from metric_kd.distill.relational import crd as file
from metric_kd.distill.relational.crd import Contrasts, crd, last_places
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Pair
from metric_kd.types import Batch, Output

LABELS = torch.arange(24) % 4


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0, dtype=torch.float64):
    return nn.functional.normalize(random(*shape, seed=seed, dtype=dtype), dim=1)


def pair_of(student, teacher, indices, labels=LABELS):
    size = len(indices)
    batch = Batch(torch.zeros(size, 3, 1, 1, dtype=torch.uint8), labels[indices], indices)
    ours, theirs = Output(embedding=student), Output(embedding=teacher)
    return Pair(lambda *_: ours, lambda *_: theirs, torch.ones(1, 3, 1, 1), labels, 4, ours, theirs, batch)


def built(student, teacher, indices, labels=LABELS, seed=0, **options):
    torch.manual_seed(seed)
    term = TERMS["crd"](**({"dim": 5, "negatives": 7} | options))
    pair = pair_of(student, teacher, indices, labels)
    term.build(pair)
    return term, pair


class Given(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, indices):
        return self.rows


def slow(student, teacher, student_memory, teacher_memory, rows, temperature, eps):
    total, images = 0.0, len(student_memory)
    for anchors, memory in ((student, teacher_memory), (teacher, student_memory)):
        x = torch.stack(
            [
                torch.stack([((memory[r] * v).sum() / temperature).exp() for r in row])
                for v, row in zip(anchors, rows, strict=True)
            ]
        )
        x = x / (images * x.mean()).detach()
        noise = (rows.shape[1] - 1) / images
        for row in x:
            total = total - (row[0] / (row[0] + noise + eps)).log() / len(x)
            for value in row[1:]:
                total = total - (noise / (value + noise + eps)).log() / len(x)
    return total


def test_golden_two_calls():
    pinned = case("zoo_crd", family="zoo")
    student, teacher = pinned.inputs["feat_s"].requires_grad_(), pinned.inputs["feat_t"]
    labels = torch.arange(32) % 2
    term, pair = built(student, teacher, pinned.inputs["idx"], labels, dim=8, negatives=12)
    term.double()
    with torch.no_grad():
        term.student_layer.weight.copy_(pinned.aux["ws"])
        term.student_layer.bias.copy_(pinned.aux["bs"])
        term.teacher_layer.weight.copy_(pinned.aux["wt"])
        term.teacher_layer.bias.copy_(pinned.aux["bt"])
        term.student_memory.copy_(pinned.aux["memory_s0"])
        term.teacher_memory.copy_(pinned.aux["memory_t0"])
    term.contrasts = Given(pinned.inputs["sample_idx"])
    wanted = pinned.outputs
    loss = term(pair)
    loss.backward()
    assert_close(loss, wanted["loss"])
    assert_close(loss, case("rep_crd", family="zoo").outputs["loss"])
    assert_close(term.log_z.exp(), torch.stack([wanted["Z_s"], wanted["Z_t"]]))
    assert_close(student.grad, wanted["grad_feat_s"])
    assert_close(term.student_layer.weight.grad, wanted["grad_ws"])
    assert_close(term.teacher_layer.weight.grad, wanted["grad_wt"])
    assert_close(term.student_memory, wanted["memory_s1"])
    assert_close(term.teacher_memory, wanted["memory_t1"])
    student.grad = None
    frozen = term.log_z.clone()
    again = term(pair)
    again.backward()
    assert_close(again, wanted["loss_call2"])
    assert_close(student.grad, wanted["grad_feat_s_call2"])
    assert torch.equal(term.log_z, frozen)


@pytest.mark.parametrize("at_once", [file.AT_ONCE, 1, 40])
def test_oracle_and_gradients_in_any_chunks(monkeypatch, at_once):
    monkeypatch.setattr(file, "AT_ONCE", at_once)
    memories = unit(20, 6, seed=2), unit(20, 6, seed=3)
    rows = torch.randint(20, (5, 9), generator=torch.Generator().manual_seed(1))  # some rows twice
    for temperature, eps in ((0.5, 1e-7), (0.1, 1e-2)):
        student, teacher = (unit(5, 6, seed=s).requires_grad_() for s in (0, 1))
        loss = crd(student, teacher, *memories, rows, temperature, eps)
        grads = torch.autograd.grad(loss, (student, teacher))
        wanted = slow(student, teacher, *memories, rows, temperature, eps)
        assert_close(loss, wanted.detach())
        for ours, theirs in zip(grads, torch.autograd.grad(wanted, (student, teacher)), strict=True):
            assert_close(ours, theirs)
    log_z = torch.tensor([2.0, 3.0]).double()
    assert gradcheck(lambda s, t: crd(s, t, *memories, rows, 0.5, log_z=log_z), (student, teacher))


def test_safe_at_a_tiny_temperature_and_without_a_direction():
    memory, rows = unit(20, 6, dtype=torch.float32), torch.arange(20).view(2, 10)
    student = unit(2, 6, seed=1, dtype=torch.float32).requires_grad_()
    loss = crd(student, memory[:2], memory, memory, rows, temperature=1e-3)  # exp would overflow
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    dead = torch.zeros(1, 3, requires_grad=True)
    term, pair = built(dead, torch.zeros(1, 6), torch.tensor([3]))
    nn.init.zeros_(term.student_layer.bias)
    term(pair).backward()
    assert dead.grad.isfinite().all() and term.student_memory.isfinite().all()


def test_half_types_and_autocast_are_raised():
    student, teacher = random(3, 4, dtype=torch.float32), random(3, 6, seed=1, dtype=torch.float32)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = student.to(dtype, copy=True).requires_grad_()
        term, pair = built(leaf, teacher.to(dtype), torch.arange(3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(term(pair))
        losses[-1].backward()
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    assert all(loss.dtype == torch.float32 for loss in losses) and torch.allclose(*losses, rtol=1e-2)


def test_the_loss_reads_the_memory_before_the_update_and_stays_differentiable_after_it():
    student, teacher = random(4, 3, dtype=torch.float32).requires_grad_(), random(4, 6, dtype=torch.float32)
    indices = torch.tensor([1, 2, 3, 9])
    term, pair = built(student, teacher, indices)
    term.contrasts = Given(Contrasts(LABELS, 7)(indices))
    before = term.student_memory.clone(), term.teacher_memory.clone()
    ours = nn.functional.normalize(term.student_layer(student))
    theirs = nn.functional.normalize(term.teacher_layer(teacher))
    wanted = crd(ours, theirs, *before, term.contrasts.rows)
    (expected,) = torch.autograd.grad(wanted, student)
    loss = term(pair)
    loss.backward()
    assert torch.allclose(loss, wanted) and torch.allclose(student.grad, expected, atol=1e-6)
    assert not term.student_memory.requires_grad and not torch.equal(term.student_memory, before[0])


def test_memory_and_z_change_in_training_mode_only_and_are_in_the_state():
    features = random(3, 3, dtype=torch.float32), random(3, 6, dtype=torch.float32)
    term, pair = built(*features, torch.arange(3))
    assert set(term.state_dict()) >= {"student_memory", "teacher_memory", "log_z"}
    assert {tuple(p.shape) for p in term.parameters()} == {(5, 3), (5, 6), (5,)}
    assert term.student_memory.abs().max() <= math.sqrt(3 / 5) < 1.1 * term.student_memory.abs().max()
    before = {key: value.clone() for key, value in term.state_dict().items()}
    term.eval()
    assert term(pair).isfinite()
    assert all(torch.equal(before[key], value) for key, value in term.state_dict().items())
    term.train()
    term(pair)
    assert torch.equal(term.student_memory[3:], before["student_memory"][3:]) and term.log_z.isfinite().all()
    again, same = built(*features, torch.arange(3), seed=5)
    again.load_state_dict(term.state_dict())
    torch.manual_seed(9)
    expected = term(pair)
    torch.manual_seed(9)
    assert torch.equal(again(same), expected) and torch.equal(again.teacher_memory, term.teacher_memory)


def test_an_image_twice_in_a_batch_is_remembered_as_its_last_place_says():
    student, teacher = random(4, 3, dtype=torch.float32), random(4, 6, dtype=torch.float32)
    assert last_places(torch.tensor([7, 2, 7, 5, 2])).tolist() == [2, 4, 2, 3, 4]
    term, pair = built(student, teacher, torch.tensor([7, 2, 7, 7]), momentum=0.25)
    old = term.teacher_memory[7].clone()
    term(pair)
    new = nn.functional.normalize(term.teacher_layer(teacher)[3], dim=0)
    assert torch.allclose(term.teacher_memory[7], nn.functional.normalize(0.25 * old + 0.75 * new, dim=0))


def test_negatives_are_distinct_and_of_other_classes():
    labels = torch.tensor([5, 2, 5, 9, 9, 9, 2, 5, 9, 9])
    torch.manual_seed(0)
    rows = Contrasts(labels, 5)(torch.arange(10))
    assert rows.shape == (10, 6) and torch.equal(rows[:, 0], torch.arange(10))
    assert (labels[rows[:, 1:]] != labels[:, None]).all()
    assert all(len(row[1:].unique()) == 5 for row in rows)


@pytest.mark.parametrize("negatives", [2, 6, 7, 9, 40])
def test_every_image_of_another_class_is_equally_likely(negatives):
    """Class 9 leaves 5 images, class 2 leaves 8, class 5 leaves 7: all without, mixed, and all with replacement."""
    labels = torch.tensor([5, 2, 5, 9, 9, 9, 2, 5, 9, 9])
    torch.manual_seed(1)
    anchors = torch.tensor([0, 1, 3]).repeat_interleave(20000 // negatives)
    drawn = Contrasts(labels, negatives)(anchors)[:, 1:]
    for anchor in (0, 1, 3):
        mine = drawn[anchors == anchor]
        pool = (labels != labels[anchor]).nonzero()[:, 0]
        frequency = torch.bincount(mine.flatten(), minlength=10) / mine.numel()
        assert frequency[labels == labels[anchor]].sum() == 0
        assert (frequency[pool] * len(pool) - 1).abs().max() < 0.12
        if negatives <= len(pool):
            assert all(len(row.unique()) == negatives for row in mine[:50])


def test_pairs_of_negatives_are_equally_likely():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 1, 1, 1])
    drawn = Contrasts(labels, 2)(torch.zeros(6000, dtype=torch.int64))[:, 1:].sort(1).values
    _, count = (drawn[:, 0] * 5 + drawn[:, 1]).unique(return_counts=True)
    assert len(count) == 6 and (count / 1000 - 1).abs().max() < 0.12


def test_relaxed_positives_and_seeded_draws(monkeypatch):
    contrasts = Contrasts(LABELS, 3, relax=True)
    torch.manual_seed(0)
    anchors = torch.arange(24).repeat(100)
    positives = contrasts(anchors)[:, 0]
    assert torch.equal(LABELS[positives], LABELS[anchors])
    assert (torch.bincount(positives) / 100 - 1).abs().max() < 0.5
    torch.manual_seed(3)
    first = contrasts(anchors)
    torch.manual_seed(3)
    assert torch.equal(first, contrasts(anchors))
    monkeypatch.setattr(file, "AT_ONCE", 50)  # two anchors at a time
    assert (LABELS[contrasts(anchors[:7])[:, 1:]] != LABELS[anchors[:7], None]).all()


def test_learns():
    """Trained alone, the loss brings the student's view of an image near the teacher's of the same image."""
    torch.manual_seed(0)
    teacher = torch.randn(24, 6)
    student = nn.Parameter(torch.randn(24, 3))
    term, _ = built(student, teacher, torch.arange(24), dim=8, negatives=12)
    optimiser, losses = torch.optim.Adam([student, *term.parameters()], lr=0.02), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = term(pair_of(student, teacher, torch.arange(24)))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_never_makes_what_the_plain_formula_would():
    """N (1 + K) d would be 34 MB here, held at most: a twentieth."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and not any(isinstance(a, torch.Tensor) and a is x for a in args):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    memory = unit(2000, 128, dtype=torch.float32)
    anchors = unit(16, 128, seed=1, dtype=torch.float32).requires_grad_()
    labels = torch.arange(2000) % 10
    with Watch():
        rows = Contrasts(labels, 4096)(torch.arange(16))
        crd(anchors, anchors.detach(), memory, memory, rows).backward()
    assert largest <= 16 * 4097 * 128 * 4 / 20


def test_no_gradient_reaches_the_teacher_and_the_class_is_declared():
    teacher = random(3, 6, dtype=torch.float32).requires_grad_()
    term, pair = built(random(3, 3, dtype=torch.float32).requires_grad_(), teacher, torch.arange(3))
    term(pair).backward()
    assert teacher.grad is None and term.teacher_layer.weight.grad.abs().sum() > 0
    assert term.relates and TERMS["crd"]().negatives == 16384


def test_bad_input():
    for options in ({"dim": 0}, {"negatives": 0}, {"temperature": 0.0}, {"momentum": 1.0}, {"eps": -1.0}):
        with pytest.raises(UserError, match="crd needs dim"):
            TERMS["crd"](**options)
    with pytest.raises(UserError, match="did you mean 'relax'"):
        TERMS["crd"](mode="relaxed")
    with pytest.raises(UserError, match="two classes"):
        Contrasts(torch.zeros(5, dtype=torch.int64), 3)
    x = unit(2, 3)
    with pytest.raises(UserError, match="one positive and one or more"):
        crd(x, x, x, x, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="one width"):
        crd(x, x, x, unit(2, 4), torch.zeros(2, 2, dtype=torch.int64))
