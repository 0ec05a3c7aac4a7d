"""Imitation of one layer: its value, its layers by name, what it refuses; and the share of a feature that is explained."""

import pytest
import torch

from metric_kd.cli.losses import fold, losses_of
from metric_kd.cli.parse import parse
from metric_kd.cli.validate import validate
from metric_kd.distill.feature.imitate import Imitate
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.evaluation.imitation import Explained, evaluate_imitation
from metric_kd.functional import imitate
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models import NetworkSpec, build_network
from metric_kd.types import Batch, Output

IMAGES = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.arange(6) % 4, torch.arange(6))


def network(base="resnet8_x0.25:stem_stride=2", seed=0, classes=4, embedding=0):
    torch.manual_seed(seed)
    return build_network(NetworkSpec(base, embedding, False, 32, num_classes=classes))


def test_the_mean_over_all_elements():
    student, teacher = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    slow = [
        (student[n, c, i, j] - teacher[n, c, i, j]) ** 2
        for n in range(3)
        for c in range(4)
        for i in range(2)
        for j in range(2)
    ]
    assert imitate(student, teacher).item() == pytest.approx(sum(slow).item() / 48, rel=1e-6)
    assert imitate(student.half(), teacher).dtype == torch.float32


@pytest.mark.parametrize(
    "options, ours, theirs",
    [
        ("", "layer:embedding", "layer:embedding"),
        (",layer=conv", "layer:conv", "layer:conv"),
        (",layer=base.layer2,teacher_layer=base.layer3.0", "layer:base.layer2", "layer:base.layer3.0"),
    ],
)
def test_what_it_reads(options, ours, theirs):
    objective = Objective([parse_loss(f"imitate:1{options}")])
    assert (objective.student_needs, objective.teacher_needs) == ((ours,), (theirs,))


@pytest.mark.parametrize("layer", ["conv", "pooled", "embedding", "logits", "base.layer2.0.bn1"])
def test_a_step_moves_what_runs_up_to_the_layer(layer):
    student, teacher = network(), network(seed=1)
    task = Solo(student, teacher, Objective([parse_loss(f"imitate:2,layer={layer}")]))
    task.build(BATCH, 4)
    total, values = task.eval()(BATCH)
    with torch.no_grad():
        s, t = (net(IMAGES, want=(f"layer:{layer}",)).taps[layer] for net in (student, teacher.eval()))
    assert total.item() == pytest.approx(2 * (s - t).square().mean().item(), rel=1e-5)
    assert values["imitate"].item() == pytest.approx(total.item() / 2)
    total.backward()
    moved = {name for name, p in student.named_parameters() if p.grad is not None}
    assert ("classifier.weight" in moved) == (layer == "logits")
    assert any("layer3" in name for name in moved) == (layer != "base.layer2.0.bn1")


def test_layers_of_different_names():
    teacher = network(seed=1)
    student = network(f"vgg11_fc:width={teacher.pooled_size}")
    task = Solo(student, teacher, Objective([parse_loss("imitate:1,layer=fc1,teacher_layer=pooled")]))
    task.build(BATCH, 4)
    assert task.eval()(BATCH)[0].item() > 0


def test_what_cannot_be():
    with pytest.raises(UserError, match=r"the student's is 4x2x2 and the teacher's 8: choose layers of one size"):
        imitate(torch.zeros(3, 4, 2, 2), torch.zeros(3, 8))
    narrow = Solo(network(), network("resnet8:stem_stride=2"), Objective([parse_loss("imitate:1,layer=conv")]))
    with pytest.raises(UserError, match="compares features of one shape"):
        narrow.build(BATCH, 4)
    unknown = Solo(network(), network(), Objective([parse_loss("imitate:1,layer=fc1")]))
    with pytest.raises(UserError, match="unknown layer 'fc1'"):
        unknown.build(BATCH, 4)
    with pytest.raises(UserError, match="peers can imitate each other at one layer only"):
        Imitate("pooled", "logits").forward(Output(taps={"pooled": torch.zeros(1)}), Output(taps={}), BATCH)


def test_the_flag_is_this_loss_alone():
    words = ["--teacher_load", "x", "--imitate", "base.layer3", "--teacher_layer", "conv"]
    config = fold(parse("distill", words).config)
    assert losses_of(config) == [parse_loss("imitate:1,layer=base.layer3,teacher_layer=conv")]
    assert fold(config) == config
    for more in (["--loss", "st:1"], ["--dist_ratio", "1"], ["--loss", "imitate:2,layer=base.layer3"]):
        with pytest.raises(UserError, match="learns the teacher's feature and nothing else"):
            fold(parse("distill", [*words, *more]).config)


@pytest.mark.parametrize(
    "command, words, sentence",
    [
        ("distill", ["--imitate", "conv"], "a teacher is needed"),
        ("distill", ["--imitate", "conv", "--mutual", "resnet8"], "leave them or --mutual out"),
        (
            "distill",
            ["--imitate", "conv", "--teacher_load", "x", "--load", "y", "--fit_head", "conv"],
            "after the other",
        ),
        ("distill", ["--imitate", "conv", "--teacher_load", "x", "--granularity", "mag"], "leave --granularity out"),
        ("distill", ["--teacher_layer", "conv", "--loss", "st:1", "--teacher_load", "x"], "give --imitate LAYER too"),
        ("distill", ["--fit_head", "conv", "--load", "x", "--loss", "st:1"], "a teacher is needed"),
        ("train", ["--fit_head", "conv"], "--fit_head keeps layers of a trained network; give --load"),
        ("train", ["--fit_head", "conv", "--load", "x", "--mode", "eval"], "leave it or --mode eval out"),
        ("train", ["--schedule", "log", "--lr_decay_gamma", "0"], "give a gamma above 0"),
        ("train", ["--loss", "imitate:1"], "use run_distill.py"),
    ],
)
def test_combinations_that_are_refused(command, words, sentence):
    config = fold(parse(command, words).config)
    assert any(sentence in text for text in validate(config)), validate(config)


def test_a_head_needs_no_teacher_and_learns_labels_by_default():
    config = fold(parse("distill", ["--task", "classification", "--fit_head", "fc1", "--load", "x"]).config)
    assert config.loss == ["cross_entropy:1,features=logits"] and not [s for s in validate(config) if "teacher" in s]


@pytest.mark.parametrize("sizes", [(7,), (1, 1, 5), (3, 4)])
def test_explained_equals_the_slow_formula(sizes):
    generator = torch.Generator().manual_seed(1)
    teacher = 1e3 + torch.randn(7, 3, 2, 2, generator=generator)  # a mean far larger than the spread
    student = teacher + 0.3 * torch.randn(7, 3, 2, 2, generator=generator)
    explained = Explained()
    for s, t in zip(student.split(sizes), teacher.split(sizes), strict=True):
        explained.add(s, t)
    s, t = student.double().flatten(1), teacher.double().flatten(1)
    gap = sum(((a - b) ** 2).sum() for a, b in zip(s, t, strict=True))
    spread = sum(((b - t.mean(0)) ** 2).sum() for b in t)
    assert explained.value() == pytest.approx(1 - (gap / spread).item(), rel=1e-10)


def test_explained_at_its_ends():
    teacher = torch.randn(5, 4)
    for student, expected in ((teacher, 1.0), (teacher.mean(0).expand(5, 4), 0.0), (-teacher, None)):
        explained = Explained()
        explained.add(student, teacher)
        assert explained.value() == pytest.approx(expected, abs=1e-6) if expected is not None else explained.value() < 0
    still = Explained()
    still.add(torch.randn(5, 4), torch.ones(5, 4))
    assert still.value() == 0
    with pytest.raises(UserError, match="no images"):
        Explained().value()


def test_a_network_explains_itself_and_keeps_its_modes():
    student = network().train()
    student.base.bn1.eval() if hasattr(student.base, "bn1") else None
    modes = [module.training for module in student.modules()]
    batches = [BATCH._replace(images=IMAGES[:4]), BATCH._replace(images=IMAGES[4:])]
    assert evaluate_imitation(student, network(), batches, "conv") == 1
    other = evaluate_imitation(student, network(seed=3), batches, "pooled", "pooled")
    assert other < 1 and modes == [module.training for module in student.modules()]
