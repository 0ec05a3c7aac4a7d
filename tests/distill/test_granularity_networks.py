"""Every network of the paper as student and as teacher: one finite step of KD, of MAG and of MAS."""

import pytest
import torch

from metric_kd.distill.granularity import ABSTRACT, DETAILED, CodedTeacher
from metric_kd.engine.coding import coders_for
from metric_kd.engine.tasks import Solo
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models import NetworkSpec, build_network
from metric_kd.types import Batch

NETWORKS = """resnet8 resnet14 resnet20 resnet32 resnet44 resnet56 resnet110 resnet8_x4 resnet32_x4 resnet14_x0.5
    resnet20_x0.5 resnet20_x0.375 resnet50_cifar wrn_16_1 wrn_40_1 wrn_16_2 wrn_40_2 vgg8_cifar vgg11_cifar vgg13_cifar
    vgg16_cifar vgg19_cifar mobilenet_v2_cifar shufflenet_v1_cifar shufflenet_v2_cifar""".split()
LARGE = "resnet110 resnet32_x4 resnet50_cifar wrn_40_2 vgg13_cifar vgg16_cifar vgg19_cifar".split()
CLASSES = 100


def network(base, seed):
    torch.manual_seed(seed)
    return build_network(NetworkSpec(base, 0, False, num_classes=CLASSES))


def batch():
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return Batch(images, torch.tensor([0, 1, 1, 99]), torch.arange(4))


def one_step(student, teacher, losses):
    """{loss: value} of one step of SGD; the gradient of every weight of the student that must have one is finite."""
    task = Solo(student, teacher, Objective([parse_loss(loss) for loss in losses]))
    task.build(Batch(*(field[:2] for field in batch()[:3])), CLASSES)
    task.begin_epoch(1, 1)
    parameters = [p for group in task.train().parameter_groups() for p in group["params"]]
    total, values = task(batch())
    total.backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None]
    assert not missing, f"{missing[0]} learns nothing"
    norms = torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
    assert norms.isfinite().all() and total.isfinite()
    torch.optim.SGD(parameters, 0.01).step()
    assert all(p.isfinite().all() for p in parameters)
    student.zero_grad(set_to_none=True)
    return values


@pytest.mark.parametrize(
    "base",
    [pytest.param(base, marks=[pytest.mark.slow] if base in LARGE else []) for base in NETWORKS],
)
def test_one_step_of_kd_mag_and_mas(base):
    """The teacher has the same form and other weights, so that each network is tried in both places."""
    student, teacher = network(base, 0), network(base, 1)
    statistics = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    torch.manual_seed(2)
    coders = coders_for(teacher, "logits", ABSTRACT, DETAILED)
    logits = ["cross_entropy:1,features=logits", "st:1,temperature=4"]
    arms = {
        "kd": one_step(student, teacher, logits),
        "mag": one_step(student, CodedTeacher(teacher, coders), [*logits, "granularity:1"]),
        "mas": one_step(student, CodedTeacher(teacher, coders, stable=True), [*logits, "granularity:1"]),
    }
    for values in arms.values():
        assert all(value > 0 for value in values.values()), "a loss that says nothing"
    assert "granularity" not in arms["kd"] and {"st", "granularity"} < set(arms["mas"])
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in teacher.named_buffers())
    assert all(p.grad is None for p in teacher.parameters())
