"""The optimiser and the learning rate of a run: pure functions of its settings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from metric_kd.errors import one_of
from metric_kd.losses.term import Stage

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("step", "cosine", "log")


@dataclass(frozen=True)
class Settings:
    """How long, how fast and how precisely to train.

    lr_decay_epochs: epochs (counted from 1) from which on the rate is multiplied by lr_decay_gamma once more; warmup:
    epochs of linear warm-up; nesterov: of SGD; clip_norm: largest gradient norm, 0 for none; save_minutes: checkpoint at
    least this often. iterations: steps in an epoch; accumulate: batches in a step, one after the other; chunk: images that
    the networks take at a time where a batch is too large for them (:mod:`metric_kd.engine.replay`), 0 for all of it.
    log_gradients: steps between measurements of the losses' shares in the gradient, 0 for none.
    """

    epochs: int
    iterations: int
    lr: float
    optimizer: str = "adam"
    weight_decay: float = 1e-5
    schedule: str = "step"
    lr_decay_epochs: Sequence[int] = ()
    lr_decay_gamma: float = 0.1
    warmup: float = 0.0
    nesterov: bool = True
    clip_norm: float = 0.0
    freeze_bn: bool = False
    precision: str = "fp32"
    accumulate: int = 1
    chunk: int = 0
    seed: int = 0
    save_minutes: float = 10.0
    log_interval: int = 20
    log_gradients: int = 0


def learning_rate(settings: Settings, epoch: int, iteration: int) -> float:
    """The rate of a step: ``epoch`` counts from 1, ``iteration`` from 0 within it.

    step: lr * gamma^(number of milestones <= epoch). The seed steps its schedule before the epoch, so milestone m
    takes effect in epoch m itself, not in m + 1. cosine: lr * (1 + cos(pi * progress)) / 2 after the warm-up. log: even
    steps of the exponent, one an epoch, from lr in the first epoch after the warm-up to lr * gamma in the last.
    """
    done = epoch - 1 + iteration / max(settings.iterations, 1)
    if done < settings.warmup:
        return (
            settings.lr * (done + 1 / max(settings.iterations, 1)) / (settings.warmup + 1 / max(settings.iterations, 1))
        )
    if settings.schedule == "cosine":
        progress = (done - settings.warmup) / max(settings.epochs - settings.warmup, 1e-9)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    if settings.schedule == "log":
        first = math.ceil(settings.warmup) + 1
        progress = max(epoch - first, 0) / max(settings.epochs - first, 1)
        return settings.lr * settings.lr_decay_gamma**progress
    if settings.schedule != "step":
        raise one_of("schedule", settings.schedule, SCHEDULES)
    return settings.lr * settings.lr_decay_gamma ** sum(epoch >= milestone for milestone in settings.lr_decay_epochs)


def milestone(share: float, epochs: int) -> int:
    """The first epoch, counted from 1, after ``share`` of all epochs, of which one at least comes before it."""
    return max(1, round(share * epochs)) + 1


def stage_settings(main: Settings, stage: Stage) -> Settings:
    """The settings of a stage before the main one: its own length and steps, the run's optimiser and precision."""
    epochs = stage.epochs or max(1, round(stage.share * main.epochs))
    return replace(
        main,
        epochs=epochs,
        lr=main.lr * stage.lr,
        schedule="step",
        lr_decay_epochs=tuple(milestone(share, epochs) for share in stage.milestones),
        lr_decay_gamma=0.1,
        warmup=0.0,
        nesterov=stage.nesterov,
    )


def make_optimizer(
    settings: Settings, parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]]
) -> torch.optim.Optimizer:
    """Fused Adam, AdamW or SGD (momentum 0.9) over the trainable ones of some parameters, or over groups of them.

    A group with "own_lr" keeps that rate's ratio to the run's: its entry "factor" is what the run's rate is multiplied
    by in every step.
    """
    groups: list[Mapping[str, Any]] = []
    alone: list[nn.Parameter] = []
    for entry in parameters:
        groups += [entry] if isinstance(entry, Mapping) else []
        alone += [entry] if isinstance(entry, nn.Parameter) and entry.requires_grad else []
    groups += [{"params": alone}] if alone else []
    prepared = [
        {"params": group["params"], "factor": group.get("own_lr", settings.lr) / settings.lr} for group in groups
    ]
    shared: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "adam":
        return torch.optim.Adam(prepared, **shared)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(prepared, **shared)
    if settings.optimizer != "sgd":
        raise one_of("optimizer", settings.optimizer, OPTIMIZERS)
    sgd = torch.optim.SGD(prepared, momentum=0.9, nesterov=settings.nesterov, **shared)
    # Fused, PyTorch's leaves the memory of momentum as it found it where a scaler skips the first step, and fails at a parameter
    # whose first gradient comes after another's. From zero the first step is the same.
    for group in sgd.param_groups:
        for parameter in group["params"]:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the run's rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Shorten the gradient of each group of parameters, which peers have each on its own, to at most this norm."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], norm)
