"""Steps of small networks, in float64, as the trainer takes them: what tests of the step compare with slow oracles."""

import torch
from torch import nn

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd import distributed
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Solo
from metric_kd.engine.trainer import Trainer
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.losses.term import TERMS
from metric_kd.models.backbone import BACKBONES, Backbone
from metric_kd.models.network import NetworkSpec, build_network
from metric_kd.types import Batch, Output

CPU = torch.device("cpu")
LABELS = torch.arange(48) % 4


class Step(Backbone):
    """Three stages without kinks. norm: "group" has no batch statistics, "batch" has; dropout: before every convolution."""

    input_size = 12
    provides = frozenset({"pooled", "maps", "preacts"})

    def __init__(self, width: int = 4, norm: str = "group", dropout: float = 0.0):
        super().__init__()
        self.pooled_size = 2 * width
        widths = (3, width, width, 2 * width)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=1 + (k == 2), padding=1) for k, (a, b) in enumerate(pairs))
        self.norms = nn.ModuleList(nn.GroupNorm(2, b) if norm == "group" else nn.BatchNorm2d(b) for _, b in pairs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images, want=("pooled",)):
        maps, preacts = [], []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            preacts.append(norm(conv(self.dropout(maps[-1] if maps else images))))
            maps.append(nn.functional.softplus(preacts[-1]))
        return Output(tuple(maps), tuple(preacts), maps[-1].mean((2, 3)))


if "step" not in BACKBONES:
    BACKBONES.register("step")(Step)


def network(options, size, seed, l2normalize=False):
    torch.manual_seed(seed)
    return build_network(NetworkSpec(f"step{options}", size, l2normalize, 12, num_classes=4))


def batch(step, count=16, start=0):
    draw = torch.Generator().manual_seed(step)
    rows = torch.randperm(48, generator=draw)[start : start + count]
    images = torch.randint(0, 256, (48, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return Batch(images[rows], LABELS[rows], rows)


def part(whole, rows):
    return Batch(*(None if t is None else t[rows] for t in whole))


def task(*specs, options=":width=4", teacher=":width=6", size=8, dtype=torch.float64, precision="fp32"):
    """The same weights at every call: a student, a wider teacher, and the terms' own parts."""
    student, taught_by = network(options, size, 0), network(teacher, 12, 1)
    losses = [parse_loss(spec) for spec in specs]
    if not any(TERMS[loss.name].acts_in_main for loss in losses):
        losses.append(parse_loss("cross_entropy:1"))
    torch.manual_seed(2)
    built = Solo(student, taught_by, Objective(losses), precision)
    built.build(part(batch(0), slice(2)), 4, LABELS)
    taught_by.to(dtype)
    return built.to(dtype)


def stepping(built, **settings):
    """A trainer whose steps move nothing, so that gradients can be compared."""
    given = {"lr": 1e-30, "optimizer": "sgd", "weight_decay": 0.0, "seed": 3, **settings}
    return Trainer(built, Settings(epochs=1, iterations=4, **given), RunDirectory("."), None, None, CPU)


def gradients(built, whole, *, share=False, steps=1, **settings):
    """Values, gradients and buffers after a step in every stage; share: this process takes its part of the batches."""
    trainer = stepping(built, **settings)
    batches = whole if isinstance(whole, list) else [whole]
    if share:
        rank, world = distributed.rank(), distributed.world_size()
        batches = [part(b, slice(rank * (n := len(b.labels) // world), (rank + 1) * n)) for b in batches]
    found = {}
    for stage in range(len(trainer.stages)):
        trainer.enter_stage(stage)
        trainer._wrap()
        for step in range(steps):
            values = trainer.trial_step(*batches)
            found |= {f"{stage} {step} {k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
            found |= {f"{stage} {step} {k}": p.grad for k, p in built.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in built.named_buffers()}


def assert_equal(ours, theirs, rtol):
    """Up to the rounding of gradients that are zero: that of a bias, for a loss of distances."""
    assert ours.keys() == theirs.keys()
    largest = max(value.abs().max() for value in theirs.values() if value.is_floating_point() and value.numel())
    for name, value in theirs.items():
        gap = (ours[name] - value).abs().max() if value.numel() else 0
        rounding = (2e-6 if value.dtype == torch.float32 else 1e-13) * largest
        assert gap <= rtol * value.abs().max() + rounding, f"{name} differs by {gap:g}"
