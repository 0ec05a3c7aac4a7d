"""From a config to the things that run: data, networks, objective, trainer. Every command is built here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from metric_kd import distributed
from metric_kd.cli.also_eval import loaders_of
from metric_kd.cli.asymmetric import Asymmetric, check_asymmetric, check_width, is_asymmetric
from metric_kd.cli.config import (
    DistillConfig,
    GranularityConfig,
    ProbeConfig,
    RunConfig,
    array_of,
    is_evaluation,
    with_rate,
)
from metric_kd.cli.goals import Decoding, Goal, goal_of, load_splits
from metric_kd.cli.imitating import imitating
from metric_kd.cli.losses import fold, losses_of
from metric_kd.cli.networks import check_classes, coders_of, peers_of, student_of, teacher_of
from metric_kd.cli.pack import pack_for
from metric_kd.cli.parse import Parsed, parse
from metric_kd.cli.plugins import load_plugins
from metric_kd.cli.stored import with_checkpoints
from metric_kd.cli.teacher_cache import views_of, with_stored
from metric_kd.cli.unlabelled import Unlabelled, is_unlabelled, targets_of
from metric_kd.cli.validate import validate
from metric_kd.data.loading import ImageLoader
from metric_kd.data.pack import Packs
from metric_kd.data.records import ImageRecords, Splits
from metric_kd.data.transforms import Geometry
from metric_kd.devices import choose_device, has_bf16, resolve_precision
from metric_kd.distill.granularity import CodedTeacher, Coders
from metric_kd.engine.reproducibility import deterministic_algorithms
from metric_kd.engine.run_plugins import check_named, explained
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.errors import UnknownName, UserError
from metric_kd.evaluation.classification import default_top
from metric_kd.losses.objective import LossSpec, Objective, require_provided
from metric_kd.models import check_base
from metric_kd.models.layers import layers_in
from metric_kd.models.network import Network


@dataclass
class Session:
    """Everything that a config stands for, built and checked."""

    config: RunConfig
    device: torch.device
    train: ImageLoader
    test: ImageLoader
    validation: ImageLoader | None
    student: Network | Coders
    """What is trained."""
    teacher: Network | CodedTeacher | StoredTeacher | None
    notes: list[str]
    """What a user should know before the run starts: what was loaded, left out, skipped."""
    peers: dict[str, Network] = field(default_factory=dict)
    """What is trained along, by name (--mutual)."""
    targets: dict[ImageLoader, torch.Tensor] = field(default_factory=dict)
    """The teacher's embeddings of held-out images (--unlabelled, --eval asymmetric)."""
    training: ImageRecords | None = None
    """All training images, of an evaluation too."""
    also: dict[str, ImageLoader] = field(default_factory=dict)
    """Test images of other data sets (--also_eval)."""

    @property
    def goal(self) -> Goal:
        if is_unlabelled(self.config):
            return Unlabelled(self.targets)
        if is_asymmetric(self.config):
            return Asymmetric(self.config.classifier, self.targets)
        goal = goal_of(self.config)
        if isinstance(self.student, Coders):
            assert isinstance(self.teacher, Network)
            return Decoding(goal, self.teacher)
        return imitating(self.config, goal, self.teacher if isinstance(self.teacher, nn.Module) else None)

    @property
    def losses(self) -> list[LossSpec]:
        return losses_of(self.config)

    @property
    def metrics(self) -> dict[str, str]:
        """Metric -> its name for people; the first is the one to select by."""
        return self.goal.keys(self.config, self.test.records.cameras is not None)

    def close(self) -> None:
        """End the processes that decode images."""
        for loader in (self.train, self.test, self.validation, *self.also.values()):
            if loader is not None:
                loader.close()


def checked(parsed: Parsed) -> Parsed:
    """The config with everything that can be known without data filled in: one list of losses, the checkpoints' networks,
    input sizes, the precision. Raises ``UserError`` with the first thing that is wrong with it.
    """
    load_plugins(parsed.config.plugins)
    with explained(parsed.config.load, getattr(parsed.config, "teacher_load", None)):
        return _checked(parsed)


def _checked(parsed: Parsed) -> Parsed:
    config = with_checkpoints(_with_goal(fold(parsed.config), parsed.given), parsed.given)
    if is_unlabelled(config) and "dataset" not in parsed.given:
        config = replace(config, dataset="folder")
    if isinstance(config, DistillConfig) and config.mutual and config.peer_lr is None:
        config = replace(config, peer_lr=[with_rate(replace(config, base=base)).lr for base in config.mutual])
    config = with_rate(config)
    sentences = validate(config)
    if sentences:
        raise (UnknownName if sentences[0].startswith("unknown ") else UserError)(sentences[0])
    precision: Any = resolve_precision(config.precision, choose_device(config.device))
    config = replace(config, precision=precision)
    config = replace(config, input_size=check_base(config.base, config.input_size))
    if isinstance(config, DistillConfig) and config.teacher_load is not None and array_of(config) is None:
        config = replace(config, teacher_input_size=check_base(config.teacher_base, config.teacher_input_size))
    return Parsed(config, parsed.given)


def _with_goal(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """Defaults that depend on the goal: a classifier's embedding is its pooled feature, an epoch of embeddings 100 steps
    where batches are drawn by class.
    """
    if config.task != "classification":
        balanced = config.iter_per_epoch is None and not isinstance(config, GranularityConfig)
        balanced = balanced and not is_unlabelled(config)
        return replace(config, iter_per_epoch=100) if balanced else config
    plain: dict[str, Any] = {"embedding_size": 0, "l2normalize": False}
    if isinstance(config, DistillConfig):
        plain |= {f"teacher_{key}": value for key, value in plain.items()}
    return replace(config, **{key: value for key, value in plain.items() if key not in given})


def measuring_of(
    run: str,
    stored: Mapping[str, Any],
    program: str | None = None,
    plugins: Sequence[str] | None = None,
    **flags: Any,
) -> Parsed:
    """What it takes to measure a run on its own test images, as :func:`build` wants it.

    stored: the run's config, whose word on unreadable images counts. plugins: those that the user has named, which must be
    all that the run was made with; None where only those are asked for without which it cannot be opened. flags: others;
    None is not given.
    """
    if plugins is not None:
        check_named(run, stored, plugins)
    words = ["--mode", "eval", f"--load={run}"]
    words += [f"--{key}={value}" for key, value in flags.items() if value is not None]
    words += ["--skip_unreadable"] if stored.get("skip_unreadable") else []
    words += [f"--plugins={plugin}" for plugin in plugins or ()]
    return checked(parse("train", words, program))


def build(parsed: Parsed) -> Session:
    """Data, then networks, from a checked config; every refusal comes before anything is written."""
    config, given = parsed
    device = choose_device(config.device)
    distributed.start(device)
    if config.deterministic:
        deterministic_algorithms()
    notes: list[str] = []
    evaluating = is_evaluation(config)
    if len(set(distributed.gather_objects(config.precision))) > 1:
        raise UserError("not all of these machines have bf16 in hardware; give all processes one --precision.")
    if config.precision == "fp32" and not evaluating and "precision" not in given and has_bf16(device):
        notes.append("this machine computes bf16 in hardware: --precision auto trains most networks faster")
    splits = load_splits(config)
    if not config.top:
        config = replace(config, top=list(default_top(splits.test.num_classes)))
    head = goal_of(config).head(splits.train.num_classes)
    teacher: Network | CodedTeacher | None
    student: Network | Coders
    if isinstance(config, GranularityConfig):
        torch.manual_seed(config.seed)
        student, teacher = coders_of(config, given, head, splits.train.class_names)
    else:
        teacher = teacher_of(config, given, head)
        torch.manual_seed(config.seed)
        student = student_of(config, given, splits.train, head, notes)
    peers = peers_of(config, splits.train, head)
    measured = teacher if isinstance(student, Coders) else student
    assert isinstance(measured, Network)
    goal_of(config).check(config, splits.test, measured)
    if not (evaluating or isinstance(student, Coders)):
        _check_losses(config, splits.train.class_names, student, teacher, peers)
    train, validation, test = _loaders(config, splits, evaluating, pack_for(config, splits, notes))
    packs = {str(loader.pack.file) for loader in (train, validation, test) if loader is not None and loader.pack}
    notes += [f"images come from {file}" for file in sorted(packs)]
    for loader in (train, validation, test):
        if loader is not None and loader.skipped:
            notes.append(f"skipped {len(loader.skipped)} unreadable images, the first {loader.skipped[0]}")
    for loader in (test, validation):
        if loader is not None:
            goal_of(config).check(config, loader.records, measured)
    also = loaders_of(config)
    for network in peers.values():
        network.to(device)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    held = {name: loader for name, loader in (("test", test), ("validation", validation)) if loader is not None}
    held = held if is_unlabelled(config) or is_asymmetric(config) else {}
    if isinstance(teacher, Network):  # else it is known when the file of its answers is read
        check_width(config, measured, teacher.embedding_size)
    taught = with_stored(config, teacher, train, held, device, notes)
    targets = targets_of(config, taught, held, device)
    check_asymmetric(config, measured, targets.values(), notes)
    student = student.to(device)
    return Session(config, device, train, test, validation, student, taught, notes, peers, targets, splits.train, also)


def _check_losses(
    config: RunConfig,
    classes: tuple[str, ...],
    student: Network,
    teacher: Network | CodedTeacher | None,
    peers: dict[str, Network],
) -> None:
    """Refuse losses that read what the networks do not give, or logits of different classes."""
    objective = Objective(losses_of(config))
    for name, network in {"student": student, **peers}.items():
        require_provided(name, network.provides, objective)
        layers_in(network, objective.all_needs[0])
    if teacher is None:
        return
    require_provided("teacher", teacher.provides, objective, teacher=True)
    named = layers_in(teacher, objective.all_needs[1])
    if "logits" in objective.all_needs[1] or any(layer.field == "logits" for layer in named.values()):
        assert isinstance(config, DistillConfig) and config.teacher_load is not None
        way_out = "train both on the same classes (--train_classes, --labels) or choose losses that read no logits"
        check_classes(teacher, config.teacher_load, classes, way_out)


def _loaders(
    config: RunConfig, splits: Splits, evaluating: bool, pack: Packs | None
) -> tuple[ImageLoader, ImageLoader | None, ImageLoader]:
    fit, validation = splits.train, None
    if config.select == "val" and not evaluating:
        fit, validation = goal_of(config).hold_out(splits.train)
    assert config.input_size is not None
    size = config.input_size
    common: dict[str, Any] = {
        "seed": config.seed,
        "workers": config.workers,
        "skip_unreadable": config.skip_unreadable,
        "pin_memory": config.device != "cpu" and torch.cuda.is_available(),
        "progress": distributed.is_main(),
        "pack": pack,
    }
    flip, side = fit.flip, None
    if isinstance(config, ProbeConfig):  # the whole image, shrunk, as the papers do
        flip, side = flip and config.flip, size
    other = config.teacher_input_size if isinstance(config, DistillConfig) and not config.mutual else None
    other = None if other == size or array_of(config) else other
    # Whether both see the test images as well.
    compared = isinstance(config, DistillConfig) and (
        config.imitate is not None or config.unlabelled or config.eval == "asymmetric"
    )
    test_only = Geometry(input_size=size, teacher_input_size=other if compared else None, resize=side, flip=False)
    test = ImageLoader(splits.test, test_only, **common)
    if evaluating:
        return test, None, test
    held = None if validation is None else ImageLoader(validation, test_only, **common)
    geometry = Geometry(input_size=size, teacher_input_size=other, resize=side, flip=flip)
    return ImageLoader(fit, geometry, views=views_of(config), **common), held, test
