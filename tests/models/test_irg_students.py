"""The networks of the IRG nets: what they are made of, and that every preset trains the table's pairs."""

import pytest
import torch
from torch import nn

import metric_kd.distill  # noqa: F401 (registers irg)
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models import NetworkSpec, build_network
from metric_kd.types import Batch

TABLE = {
    # base: parameters, model megabytes that the results table prints as "M", widths, 3x3 convolutions
    "resnet20": (273_258, 1.09, (16, 32, 64), 19),
    "resnet20_x0.5": (69_178, 0.28, (8, 16, 32), 19),
    "resnet14_x0.5": (44_650, 0.18, (8, 16, 32), 13),
    "resnet20_x0.375": (39_238, 0.16, (6, 12, 24), 19),
}


def network(base, classes=10):
    return build_network(NetworkSpec(f"{base}:bias=true", num_classes=classes, embedding_size=0))


@pytest.mark.parametrize("base", TABLE)
def test_networks_are_those_of_the_prototxts(base):
    parameters, megabytes, widths, threes = TABLE[base]
    built = network(base)
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert round(4 * parameters / 1e6, 2) == megabytes
    convolutions = [m for m in built.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == threes
    assert sum(c.kernel_size == (1, 1) for c in convolutions) == 2 == len(convolutions) - threes
    assert all(c.bias is not None for c in convolutions)
    out = built.eval()(torch.zeros(1, 3, 32, 32), want=("maps", "embedding", "logits"))
    assert tuple(m.shape[1] for m in out.maps) == (widths[0], *widths)
    assert out.embedding.shape == (1, widths[-1]) and out.logits.shape == (1, 10)


@pytest.mark.parametrize("preset", ["zoo", "paper", "caffe", "caffe_transformation"])
@pytest.mark.parametrize("base", [base for base in TABLE if base != "resnet20"])
def test_every_preset_trains_the_pairs_of_the_table(base, preset):
    torch.manual_seed(0)
    teacher, student = network("resnet20").eval().requires_grad_(False), network(base)
    objective = Objective([parse_loss(f"irg:1,preset={preset}")])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    theirs = teacher(images, want=objective.teacher_needs)
    ours = student(images, want=objective.student_needs)
    objective.build(ours, theirs, 10)
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    total, _ = objective(ours, theirs, batch)
    total.backward()
    assert total > 0
    gradient = student.base.layer3[-1].conv2.weight.grad
    assert gradient.isfinite().all() and gradient.any()
