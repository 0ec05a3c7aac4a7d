"""From a session to what the trainer takes: the task, the batches and the settings."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metric_kd import distributed
from metric_kd.cli.config import DistillConfig, ProbeConfig, RunConfig, fit_head_of
from metric_kd.cli.nested import prefixes_of
from metric_kd.cli.session import Session
from metric_kd.distill.granularity import CodedTeacher, Coders, Encoders
from metric_kd.engine.coding import Coding
from metric_kd.engine.compiling import compiled
from metric_kd.engine.imitation import HeadFit, Imitation
from metric_kd.engine.mutual import Mutual
from metric_kd.engine.optimisation import Settings, milestone
from metric_kd.engine.probing import Probe
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective
from metric_kd.models.network import Network


def make_task(session: Session) -> Solo | Mutual | Coding:
    """The student, the objective and the teacher (or the peers) as one module, its trained parts built under the seed."""
    config, losses = session.config, session.losses
    teacher = None if isinstance(session.teacher, StoredTeacher) else session.teacher
    torch.manual_seed(config.seed + 1)
    if config.sync_bn:
        for network in (session.student, *session.peers.values()):
            synchronise(network)
    task: Solo | Mutual | Coding
    if isinstance(session.student, Coders):
        assert isinstance(session.teacher, Network)
        task = Coding(session.student, session.teacher, config.precision)
    elif session.peers:
        networks = {"student": session.student, **session.peers}
        asked = isinstance(config, DistillConfig) and config.granularity is not None
        encoders = {name: Encoders(network.pooled_size) for name, network in networks.items()} if asked else {}
        assert isinstance(config, DistillConfig)
        rates = dict(zip(session.peers, config.peer_lr or [], strict=False))
        task = Mutual(networks, losses, config.precision, encoders, rates)
    else:
        objective = Objective(losses, prefixes_of(config), config.l2normalize)
        for key, term in objective.items():
            if distributed.world_size() > 1 and term.one_process:
                raise UserError(f"loss {key!r} works in one process only; run it without torchrun.")
        if isinstance(config, ProbeConfig):
            task = Probe(session.student, objective, config.precision)
        elif (layer := fit_head_of(config)) is not None:
            task = HeadFit(session.student, teacher, objective, layer, config.precision)
        elif isinstance(config, DistillConfig) and config.imitate is not None:
            task = Imitation(session.student, teacher, objective, config.precision)
        else:
            task = Solo(session.student, session.teacher, objective, config.precision)
    records = session.train.records
    task = task.to(session.device)
    task.build(session.train.example(2).to(session.device), records.num_classes, torch.from_numpy(records.labels))
    if config.sync_bn:
        for objective in [module for module in task.modules() if isinstance(module, Objective)]:
            synchronise(objective)
    for epoch in range(1, config.epochs + 1):
        task.begin_epoch(epoch, config.epochs)
    task = task.to(session.device)
    if config.compile:
        every = [*task.networks.values(), session.teacher]
        task.compiled = compiled((n for n in every if isinstance(n, Network | CodedTeacher)), session.device)
    return task


def synchronise(module: nn.Module) -> None:
    """Let batch normalisation inside a module normalise by the batch of all processes; one process has that already."""
    if distributed.world_size() > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def make_batches(session: Session) -> Any:
    """Which images make a batch, as the goal wants it; so many batches that the asked-for steps make an epoch."""
    config, steps = session.config, session.config.iter_per_epoch
    drawn = replace(
        config,
        batch=config.relation_batch or config.batch,
        iter_per_epoch=None if steps is None else steps * config.accumulate,
    )
    batches = session.goal.batches(drawn, session.losses, session.train.records)
    held = getattr(batches, "held", drawn.batch)
    if held < drawn.batch:
        session.notes.append(f"a step takes {held} images instead of {drawn.batch}: the training images cannot fill it")
    return batches


def make_settings(config: RunConfig, iterations: int) -> Settings:
    """The trainer's settings; ``iterations`` batches make an epoch."""
    at = config.lr_decay_at
    milestones = config.lr_decay_epochs if at is None else [milestone(share, config.epochs) for share in at]
    return Settings(
        epochs=config.epochs,
        iterations=-(-iterations // config.accumulate),
        accumulate=config.accumulate,
        chunk=0 if config.relation_batch is None else config.batch // distributed.world_size(),
        lr=config.lr,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        lr_decay_epochs=tuple(milestones),
        lr_decay_gamma=config.lr_decay_gamma,
        warmup=config.warmup,
        nesterov=config.nesterov,
        clip_norm=config.clip_norm,
        freeze_bn=config.freeze_bn,
        precision=config.precision,
        seed=config.seed,
        save_minutes=config.save_minutes,
        log_gradients=config.log_gradients,
    )
