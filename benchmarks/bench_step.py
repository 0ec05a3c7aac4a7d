"""One step of RKD, resnet50 to resnet18, and one step of the optimiser: ours against the same computation written plainly.

    python benchmarks/bench_step.py [--quick]

Wall time with two threads, rounds interleaved; run it on a machine that does nothing else. The reference is what the
formulas say in float32: two networks of torchvision on NCHW images that are normalised already, plain distances and
angles, Adam as it is by default. Ours is the task that the trainer runs, on the loader's uint8 images in channels_last,
which both networks normalise within the step, with fused Adam. Loss and gradient of both in float32 are compared first.
Weights are random: none of the times depends on them.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from bench_angle import plain as plain_rkd_angle  # noqa: E402
from bench_pairs import plain_rkd_distance  # noqa: E402
from measure import WALL, Row, Target, compared, interleaved, show  # noqa: E402

import metric_kd.distill  # noqa: E402, F401 (registers the methods)
from metric_kd.engine.optimisation import Settings, make_optimizer  # noqa: E402
from metric_kd.engine.stored_teacher import StoredTeacher  # noqa: E402
from metric_kd.engine.tasks import Solo  # noqa: E402
from metric_kd.losses.objective import Objective, parse_loss  # noqa: E402
from metric_kd.models import Network, NetworkSpec, build_network  # noqa: E402
from metric_kd.types import Batch  # noqa: E402

LOSSES = ("rkd_distance:1", "rkd_angle:2")
STUDENT = NetworkSpec("resnet18", embedding_size=64, l2normalize=False)
TEACHER = NetworkSpec("resnet50", embedding_size=512)
LR, WEIGHT_DECAY = 1e-4, 1e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THREADS = 2
AGREEMENT = 1e-3
"""Relative, of losses and gradients in float32: two layouts of a convolution round differently."""


class PlainNetwork(nn.Module):
    """torchvision's ResNet with a linear embedding for its last layer, and the weights of one of ours."""

    def __init__(self, ours: Network):
        super().__init__()
        from torchvision import models

        assert ours.linear is not None
        self.normalised = ours.spec.l2normalize
        self.net = models.get_model(ours.spec.base, weights=None)
        self.net.fc = nn.Linear(*reversed(ours.linear.weight.shape))
        state = {key.removeprefix("base."): value for key, value in ours.state_dict().items()}
        self.net.load_state_dict({key.replace("linear.", "fc."): value for key, value in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return F.normalize(found) if self.normalised else found


class PlainStep:
    """The reference: forward, loss, backward and Adam on normalised float images in NCHW."""

    def __init__(self, student: Network, teacher: Network):
        self.student, self.teacher = PlainNetwork(student).train(), PlainNetwork(teacher).eval()
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

    def loss(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(images)
        found = self.student(images)
        return plain_rkd_distance(found, target) + 2 * plain_rkd_angle(found, target)

    def __call__(self, images: Tensor) -> None:
        loss = self.loss(images)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def networks() -> tuple[Network, Network]:
    """(student, teacher), always the same."""
    torch.manual_seed(0)
    return build_network(STUDENT), build_network(TEACHER)


def task_of(precision: str, example: Batch, cached: bool = False) -> Solo:
    """What the trainer runs, with a student of its own. cached: the teacher's embeddings of the example are there already."""
    student, network = networks()
    teacher: Network | StoredTeacher = network
    if cached:
        with torch.no_grad():
            said = network.eval()(example.images).embedding
        assert said is not None
        teacher = StoredTeacher({"embedding": said[:, None].numpy()}, {})
    return built(Solo(student, teacher, Objective([parse_loss(loss) for loss in LOSSES]), precision), example)


def built(task: Solo, example: Batch) -> Solo:
    """Ready for its first step."""
    task.build(example, num_classes=len(example.labels.unique()))
    task.begin_epoch(1, 1)
    return task.train()


def our_step(task: Solo, batch: Batch) -> Callable[[], None]:
    """Forward, backward and the optimiser of the trainer."""
    settings = Settings(epochs=1, iterations=1, lr=LR, weight_decay=WEIGHT_DECAY)
    optimizer = make_optimizer(settings, task.parameter_groups())

    def step() -> None:
        total, _ = task(batch)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return step


def batch_of(count: int, side: int = 224, per_class: int = 4) -> Batch:
    """Images as the loader gives them: uint8 in channels_last."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = F.interpolate(small.float(), size=(side, side), mode="bilinear").round().to(torch.uint8)
    rows = torch.arange(count)
    return Batch(images.contiguous(memory_format=torch.channels_last), rows // per_class, rows)


def as_floats(images: Tensor) -> Tensor:
    """What a chain of ToTensor and Normalize gives, in NCHW."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous()


def assert_parity(batch: Batch) -> None:
    """Loss and gradient of one step in float32: the reference's, ours, and ours with stored embeddings."""
    plain = PlainStep(*networks())
    expected = plain.loss(as_floats(batch.images))
    expected.backward()
    weights = dict(plain.student.net.named_parameters())
    for cached in (False, True):
        task = task_of("fp32", batch, cached)
        total, _ = task(batch)
        total.backward()
        assert abs(total - expected) <= AGREEMENT * abs(expected), (total, expected)
        assert task.student.linear is not None
        for own, other in ((task.student.linear.weight, "fc.weight"), (task.student.base.conv1.weight, "conv1.weight")):
            right = weights[other].grad
            assert own.grad is not None and right is not None
            assert (own.grad - right).norm() <= AGREEMENT * 10 * right.norm(), other


def step_rows(count: int, rounds: int) -> list[Row]:
    batch = batch_of(count)
    assert_parity(batch)
    floats = as_floats(batch.images)
    plain = PlainStep(*networks())
    kinds = {
        "float32": (task_of("fp32", batch), Target()),
        "bf16 and channels_last": (task_of("bf16", batch), Target(time=2.5)),
        "bf16, channels_last, teacher cache": (task_of("bf16", batch, cached=True), Target(time=4)),
    }
    functions: dict[str, Callable[[], Any]] = {name: our_step(task, batch) for name, (task, _) in kinds.items()}
    found = interleaved({**functions, "plain": lambda: plain(floats)}, rounds, clock=time.perf_counter)
    size = f"resnet50 to resnet18, {count} images of 224 px"
    more = {"against": "float32, NCHW, plain losses", "clock": WALL}
    return [compared(f"RKD step, {name}", size, found, name, "plain", kinds[name][1], **more) for name in kinds]


def optimiser_row(spec: NetworkSpec, rounds: int) -> Row:
    """One step of Adam over gradients that are there."""
    network = build_network(spec)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) / 100
    start = [parameter.detach().clone() for parameter in network.parameters()]
    settings = Settings(epochs=1, iterations=1, lr=LR, weight_decay=WEIGHT_DECAY)
    optimizers = {
        "ours": make_optimizer(settings, network.parameters()),
        "plain": torch.optim.Adam(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY),
    }
    reached = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        reached[name] = [parameter.detach().clone() for parameter in network.parameters()]
        for parameter, value in zip(network.parameters(), start, strict=True):
            parameter.data.copy_(value)
    for own, other in zip(reached["ours"], reached["plain"], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    found = interleaved({name: o.step for name, o in optimizers.items()}, rounds, clock=time.perf_counter)
    name, size = "fused Adam", f"one step of {spec.base}"
    return compared(name, size, found, "ours", "plain", Target(time=2.5), against="default Adam", clock=WALL)


def rows(quick: bool = False) -> list[Row]:
    """Every comparison, after parity is asserted."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        rounds = 2 if quick else 5
        adam = [optimiser_row(spec, rounds) for spec in (STUDENT, TEACHER)]
        return [*step_rows(4 if quick else 16, rounds), *adam]
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    show(rows("--quick" in sys.argv[1:]))
