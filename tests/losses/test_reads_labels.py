"""``reads_labels`` is true of the losses whose value, or memory, changes with the labels, and of no other."""

import pytest
import torch

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.distill.granularity import CodedTeacher
from metric_kd.engine.coding import coders_for
from metric_kd.engine.tasks import Solo
from metric_kd.losses import pml
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.losses.term import TERMS
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch

OURS = [name for name in TERMS if TERMS[name].__module__.startswith("metric_kd.")]
SPEC = {"crd": "crd:1,negatives=2", "imitate": "imitate:1,layer=logits"}


def value(spec: str, labels: list[int]) -> torch.Tensor:
    """The loss of one step in evaluation mode, everything else being the same."""
    torch.manual_seed(0)
    shape = NetworkSpec("resnet8_x0.25:stem_stride=2", 6, False, 16, num_classes=4)
    teacher = build_network(shape).eval()
    student = build_network(shape).eval()
    student.load_state_dict(teacher.state_dict())
    for parameter in student.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    rows = torch.arange(8)
    if spec.startswith("granularity"):
        teacher = CodedTeacher(teacher, coders_for(teacher, "logits", 4, 8))
    task = Solo(student, teacher, Objective([parse_loss(spec)]))
    classes = torch.tensor(labels)
    task.build(Batch(images[:2], classes[:2], rows[:2]), 4, classes)
    torch.manual_seed(1)
    return task.eval()(Batch(images, classes, rows))[0].detach()


@pytest.mark.parametrize("name", OURS)
def test_every_loss_says_whether_it_reads_labels(name):
    spec = SPEC.get(name, f"{name}:1")
    if not TERMS[name].acts_in_main or name == "bss":
        pytest.skip("looked at below")
    differ = value(spec, [0, 1, 2, 3, 0, 1, 2, 3]) != value(spec, [1, 0, 0, 3, 2, 2, 1, 3])
    assert differ.item() == TERMS[name].reads_labels


def test_those_of_other_stages_and_of_the_library():
    stages = {name for name in OURS if not TERMS[name].acts_in_main}
    assert not any(TERMS[name].reads_labels for name in stages), "flows, factors and connectors are of features"
    assert TERMS["bss"].reads_labels
    if pml.names():
        assert all(TERMS[name].reads_labels for name in pml.names())
