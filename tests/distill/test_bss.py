"""BSS: golden selection, attack and schedule; the term on a small network with batch normalisation."""

import pytest
import torch
from pinned import assert_close, case
from torch import nn
from torch.autograd import gradcheck

from metric_kd.distill.logit.bss import attack, attack_classes, bss, resting_statistics, select
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Pair
from metric_kd.types import Batch, Output


def tiny(aux, who="t"):
    """The network of the golden cases."""

    def logits(x):
        for name, stride in (("w1", 1), ("w2", 2), ("w3", 1)):
            x = nn.functional.conv2d(x, aux[f"{who}_{name}"], stride=stride, padding=1).relu()
        return x.mean((2, 3)) @ aux[f"{who}_fw"].T + aux[f"{who}_fb"]

    return logits


class Small(nn.Module):
    """Normalises, convolves, classifies: enough of a network for a Pair."""

    def __init__(self, classes=5, width=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)
        self.seen = []

    def forward(self, images, want=("logits",)):
        self.seen.append(images)
        x = (images.float() / 255 - 0.5) / 0.25
        return Output(logits=self.head(self.body(x).mean((2, 3))).float())


SCALE = torch.full((1, 3, 1, 1), 1 / 255 / 0.25)


def make(agreeing=True, pixels=6, size=12, classes=5):
    torch.manual_seed(1)
    images = torch.randint(256, (size, 3, pixels, pixels), dtype=torch.uint8)
    student, teacher = Small(classes, seed=2), Small(classes, width=9, seed=3)
    teacher.eval().requires_grad_(False)
    with torch.no_grad():
        labels = teacher(images).logits.argmax(1)
        student.eval()
        ours = student(images).logits
        student.train()
    # Outputs in which both are right, or neither is; what matters to the term is who is a candidate.
    ours = ours + 20 * nn.functional.one_hot(labels if agreeing else (labels + 1) % classes, classes)
    outputs = Output(logits=ours.requires_grad_()), Output(logits=teacher(images).logits)
    student.seen.clear()
    teacher.seen.clear()
    return Pair(student, teacher, SCALE, labels, classes, *outputs, Batch(images, labels, torch.arange(size)))


@pytest.mark.parametrize("size", [32, 6])
def test_selection_golden(size):
    pinned = case(f"zoo_bss_select_{size}", family="zoo")
    student, teacher, labels, uniform = pinned.inputs.values()
    rows = select(student, teacher, labels, size)
    assert torch.equal(rows, pinned.outputs["attack_idx"])
    classes = attack_classes(teacher[rows], labels[rows], uniform[: len(rows)])
    assert torch.equal(classes, pinned.outputs["attack_class"])


def test_selection_keeps_the_largest_disagreements():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(60, 4).double(), torch.randn(60, 4).double(), torch.randint(4, (60,))
    student[torch.arange(60), labels] += 2
    teacher[torch.arange(60), labels] += 2
    scores = {}
    for n in range(60):
        if student[n].argmax() == labels[n] == teacher[n].argmax():
            gaps = (teacher[n].softmax(0) - student[n].softmax(0)).square()
            scores[n] = float(gaps.sum() - gaps[labels[n]])
    wanted = sorted(scores, key=scores.get, reverse=True)
    assert len(wanted) > 10
    assert select(student, teacher, labels, 10).tolist() == wanted[:10]
    assert select(student, teacher, labels, len(wanted)).tolist() == sorted(wanted)
    assert len(select(student, -teacher, labels, 10)) == 0


def test_attack_classes_follow_the_teacher_and_never_are_the_label():
    logits = torch.tensor([[3.0, 1.0, 0.0, 1.0 - 1e-3], [50.0, 0.0, 60.0, 0.0]]).repeat_interleave(4000, 0)
    labels = torch.tensor([0, 2]).repeat_interleave(4000)
    torch.manual_seed(0)
    drawn = attack_classes(logits, labels, torch.rand(8000))
    wanted = logits[0, 1:].softmax(0)
    share = torch.bincount(drawn[:4000], minlength=4)[1:] / 4000
    assert (share - wanted).abs().max() < 0.03 and (drawn != labels).all()
    assert (drawn[4000:] == 0).all()
    confident = torch.tensor([[200.0, 0.0, 0.0]]).expand(2, 3)  # everything else has probability zero
    assert (attack_classes(confident, torch.tensor([0, 0]), torch.tensor([0.0, 0.999])) > 0).all()
    tied = attack_classes(torch.tensor([[1.0, 1.0]]), torch.tensor([1]), torch.tensor([0.9]))
    assert tied.tolist() == [0]


def test_attack_golden():
    pinned = case("zoo_bss_attack", family="zoo")
    images, labels, classes = pinned.inputs.values()
    teacher = tiny(pinned.aux)
    step = torch.tensor(0.3).item()  # the reference multiplies by it in float32
    adv = attack(teacher, images, labels, classes, step)
    assert_close(adv, pinned.outputs["adv"])
    assert_close(attack(teacher, images, labels, classes, step, steps=1), pinned.outputs["adv_one_step"])
    assert_close(teacher(adv), pinned.outputs["teacher_logits_adv"])
    assert not adv.requires_grad and not images.requires_grad


def test_attack_moves_only_what_is_still_in_its_class_and_stays_in_range():
    pinned = case("zoo_bss_attack", family="zoo")
    images, labels, classes = (x.clone() for x in pinned.inputs.values())
    teacher = tiny(pinned.aux)
    labels[::2], classes[::2] = 3, 4  # the teacher does not say 3 anywhere
    low, high = torch.full((1, 3, 1, 1), -3.1).double(), torch.full((1, 3, 1, 1), 3.1).double()
    with torch.no_grad():  # it takes its own gradients
        adv = attack(teacher, images, labels, classes, low=low, high=high)
    assert torch.equal(adv[::2], images[::2]) and not torch.isclose(adv[1::2], images[1::2]).all()
    assert adv.abs().max() <= 3.1


def test_attack_without_a_gradient_or_with_a_saturated_teacher():
    images, labels, classes = torch.rand(2, 3, 4, 4), torch.tensor([0, 0]), torch.tensor([1, 1])

    def flat(x):
        return x.sum((1, 2, 3))[:, None] * 0.0 + torch.tensor([2.0, 1.0])

    assert torch.equal(attack(flat, images, labels, classes, low=0.0, high=1.0), images)

    def steep(x):
        mean = x.mean((1, 2, 3))
        return torch.stack([1e4 * mean, mean], dim=1)

    assert torch.equal(attack(steep, images, labels, classes), images)  # p is exactly (1, 0): no slope at all
    vanishing = attack(lambda x: steep(x) * 1e-2, images.clamp(min=0.2), labels, classes)
    assert vanishing.isfinite().all() and (vanishing <= 1).all()


def test_attack_stops_early():
    calls = []

    def teacher(x):
        calls.append(x)
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, 0.05 - mean], dim=1)

    images = torch.full((2, 3, 2, 2), 0.03)
    attack(teacher, images, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), eps=0.3)
    assert len(calls) == 2


def test_loss_golden_gradcheck_and_shapes():
    pinned = case("zoo_bss_T3", family="zoo")
    student, teacher = pinned.inputs["out_s"].requires_grad_(), pinned.inputs["out_t"].requires_grad_()
    loss = bss(student, teacher, pinned.hyper["T"])
    loss.backward()
    assert_close(loss, pinned.outputs["loss"])
    assert_close(student.grad, pinned.outputs["grad_out_s"])
    assert teacher.grad is None
    assert gradcheck(lambda s: bss(s, teacher), student)
    large = (1e4 * torch.eye(3)).half().requires_grad_()
    bss(large, -large).backward()
    assert large.grad.isfinite().all()
    with pytest.raises(UserError, match="two \\(N, K\\) tensors"):
        bss(student, teacher[:, :3])


def test_schedule_golden():
    wanted = case("zoo_bss_lambda", family="zoo").outputs["lambda_kd"]
    term = TERMS["bss"]()
    ours = [term.default_weight * term.schedule(epoch, 200) for epoch in range(1, 201)]
    assert_close(torch.tensor(ours, dtype=torch.float64), wanted, 1e-12)
    assert [term.schedule(e, 5) for e in range(1, 6)] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_term_attacks_valid_images_of_candidates_only():
    pair = make()
    pair.batch.labels[:3] = (pair.batch.labels[:3] + 1) % 5  # the teacher is wrong there
    term = TERMS["bss"](attack_size=6)
    term.build(pair)
    torch.manual_seed(0)
    loss = term(pair)
    (attacked,) = pair.student.seen
    assert len(attacked) == 6 and attacked.min() >= 0 and attacked.max() <= 255 + 1e-3
    assert not attacked.requires_grad and loss.ndim == 0
    rows = select(pair.student_output.logits, pair.teacher_output.logits, pair.batch.labels, 6)
    assert rows.min() >= 3
    moved = (attacked - pair.batch.images[rows].float()).flatten(1).norm(dim=1)
    assert (moved > 0).all()
    pair.teacher.seen.clear()
    torch.manual_seed(0)
    assert torch.allclose(term(pair), loss)
    loss.backward()
    assert pair.student.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters()) and pair.batch.images.dtype == torch.uint8


def test_term_attack_is_the_reference_attack_in_normalised_units():
    pair = make()
    term = TERMS["bss"](steps=2)
    torch.manual_seed(0)
    term(pair)
    (attacked,) = pair.student.seen
    rows = select(pair.student_output.logits, pair.teacher_output.logits, pair.batch.labels, 32)
    torch.manual_seed(0)
    classes = attack_classes(pair.teacher_output.logits[rows], pair.batch.labels[rows], torch.rand(len(rows)))
    normalised = (pair.batch.images[rows].float() / 255 - 0.5) / 0.25
    wanted = attack(
        lambda x: pair.teacher((x * 0.25 + 0.5) * 255).logits,
        normalised,
        pair.batch.labels[rows],
        classes,
        steps=2,
        low=-2.0,
        high=2.0,
    )
    assert torch.allclose(attacked, (wanted * 0.25 + 0.5) * 255, atol=1e-2)


@pytest.mark.parametrize("choice", ["keep", "update"])
def test_running_statistics(choice):
    pair = make()
    norm = pair.student.body[1]
    before = [buffer.clone() for buffer in norm.buffers()]
    loss = TERMS["bss"](batch_norm=choice)(pair)
    assert all(torch.equal(b, a) for b, a in zip(before, norm.buffers(), strict=True)) == (choice == "keep")
    assert norm.track_running_stats and pair.student.training
    (attacked,) = pair.student.seen
    with torch.no_grad():  # either way they are normalised by their own statistics
        ours, theirs = pair.student(attacked).logits, pair.teacher(attacked).logits
    assert torch.allclose(loss, bss(ours, theirs))


def test_resting_statistics_end_with_an_error():
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ValueError), resting_statistics(nn.Sequential(layer)):
        layer(torch.zeros(1, 2))
    assert layer.track_running_stats


def test_term_without_candidates_and_with_one():
    pair = make(agreeing=False)
    loss = TERMS["bss"]()(pair)
    loss.backward()
    assert loss.item() == 0 and loss.ndim == 0 and pair.student_output.logits.grad is not None
    assert not pair.student.seen
    pair = make(pixels=1)  # maps of 1x1, of which batch normalisation refuses a single one
    labels = (pair.batch.labels + 1) % 5
    labels[4] = pair.batch.labels[4]
    loss = TERMS["bss"]()(pair._replace(batch=pair.batch._replace(labels=labels)))
    loss.backward()
    assert loss.isfinite() and pair.student.head.weight.grad.isfinite().all()


def test_term_leaves_leaves_alone_and_works_under_autocast():
    pair = make()
    leaves = pair.batch.images.float().requires_grad_()
    pair = pair._replace(batch=pair.batch._replace(images=leaves))

    class Viewed:
        def __init__(self, network):
            self.network = network

        def __call__(self, images, want=("embedding",)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.network(images, want=want)

    lowered = pair._replace(student=Viewed(pair.student), teacher=Viewed(pair.teacher))
    term = TERMS["bss"]()
    term.build(lowered)
    torch.manual_seed(0)
    loss = term(lowered)
    loss.backward()
    torch.manual_seed(0)
    assert leaves.grad is None and loss.dtype == torch.float32
    assert torch.allclose(loss, term(pair), rtol=0.1)


def test_refusals():
    pair = make()
    two = pair._replace(batch=pair.batch._replace(teacher_images=pair.batch.images))
    for call in (TERMS["bss"]().build, TERMS["bss"]()):
        with pytest.raises(UserError, match="both must see one size"):
            call(two)
    with pytest.raises(UserError, match="5 and 3 logits"):
        TERMS["bss"]().build(pair._replace(teacher_output=Output(logits=torch.zeros(12, 3))))
    with pytest.raises(UserError, match="batch_norm=update"):
        TERMS["bss"]().build(pair._replace(student=lambda *_: None))
    with pytest.raises(UserError, match="did you mean 'update'"):
        TERMS["bss"](batch_norm="updates")
    for options in ({"temperature": 0.0}, {"attack_size": 0}, {"step": 0.0}, {"steps": 0}, {"eps": -1.0}):
        with pytest.raises(UserError, match="bss needs temperature"):
            TERMS["bss"](**options)
