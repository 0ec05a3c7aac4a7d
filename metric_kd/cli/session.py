"""From a config to the things that run: data, networks, objective, trainer. Both commands are built here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metric_kd import distributed
from metric_kd.cli.config import NETWORK_FIELDS, DistillConfig, RunConfig, TrainConfig
from metric_kd.cli.losses import fold, losses_of
from metric_kd.cli.parse import Parsed
from metric_kd.cli.plugins import load_plugins
from metric_kd.cli.validate import is_number, validate
from metric_kd.data import load_dataset
from metric_kd.data.batches import ClassBalancedBatches
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords, Splits, hold_out_classes
from metric_kd.data.transforms import Geometry
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import read_checkpoint, restore_network
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.reproducibility import deterministic_algorithms
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Embedding
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import embed
from metric_kd.evaluation.retrieval import check_ks, evaluate_retrieval, gallery_size
from metric_kd.losses.objective import LossSpec, Objective, option_names, require_provided
from metric_kd.models import check_base, default_pixels, load_pretrained
from metric_kd.models.backbone import Pixels
from metric_kd.models.network import Network, NetworkSpec, build_network, load_weights


@dataclass
class Session:
    """Everything that a config stands for, built and checked."""

    config: RunConfig
    device: torch.device
    train: ImageLoader
    test: ImageLoader
    validation: ImageLoader | None
    student: Network
    teacher: Network | None
    notes: list[str]
    """What a user should know before the run starts: what was loaded, left out, skipped."""

    @property
    def losses(self) -> list[LossSpec]:
        return losses_of(self.config)

    def close(self) -> None:
        """End the processes that decode images."""
        for loader in (self.train, self.test, self.validation):
            if loader is not None:
                loader.close()


def checked(parsed: Parsed) -> Parsed:
    """The config with everything that can be known without data filled in: one list of losses, the checkpoints' networks,
    input sizes. Raises ``UserError`` with the first thing that is wrong with it.
    """
    load_plugins(parsed.config.plugins)
    config = with_checkpoints(fold(parsed.config), parsed.given)
    sentences = validate(config)
    if sentences:
        raise UserError(sentences[0])
    config = replace(config, input_size=check_base(config.base, config.input_size))
    if isinstance(config, DistillConfig):
        config = replace(config, teacher_input_size=check_base(config.teacher_base, config.teacher_input_size))
    return Parsed(config, parsed.given)


def build(parsed: Parsed) -> Session:
    """Data, then networks, from a checked config; every refusal comes before anything is written."""
    config, given = parsed
    device = choose_device(config.device)
    distributed.start(device)
    if config.deterministic:
        deterministic_algorithms()
    notes: list[str] = []
    teacher = _teacher(config, given)
    evaluating = is_evaluation(config)
    splits = load_dataset(config.dataset, config.data, train_classes=_train_classes(config.train_classes))
    torch.manual_seed(config.seed)
    student = _student(config, given, splits.train, notes)
    train, validation, test = _loaders(config, splits, evaluating)
    for loader in (train, validation, test):
        if loader is not None and loader.skipped:
            notes.append(f"skipped {len(loader.skipped)} unreadable images, the first {loader.skipped[0]}")
    for loader in (test, validation):
        if loader is not None:
            records = loader.records
            check_ks(config.recall, gallery_size(len(records), records.query, records.gallery))
    session = Session(config, device, train, test, validation, student.to(device), teacher, notes)
    if teacher is not None:
        teacher.to(device).eval().requires_grad_(False)
    return session


def is_evaluation(config: RunConfig) -> bool:
    return isinstance(config, TrainConfig) and config.mode == "eval"


def make_task(session: Session) -> Embedding:
    """The student, the objective and the teacher as one module, its trained parts built under the run's seed."""
    torch.manual_seed(session.config.seed + 1)
    objective = Objective(session.losses)
    require_provided("student", session.student.provides, objective.student_needs, session.losses)
    if session.teacher is not None:
        require_provided("teacher", session.teacher.provides, objective.teacher_needs, session.losses)
    task = Embedding(session.student, session.teacher, objective, session.config.precision).to(session.device)
    try:
        task.build(session.train.example(2).to(session.device), session.train.records.num_classes)
    except RuntimeError as error:
        config = session.config
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{config.base} cannot embed images of {config.input_size} px ({reason}); change --input_size."
        ) from error
    return task.to(session.device)


def make_batches(session: Session) -> ClassBalancedBatches:
    config = session.config
    return ClassBalancedBatches(
        session.train.records.labels,
        config.batch,
        config.num_image_per_class,
        config.iter_per_epoch,
        config.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        pairs=any("sample" in option_names(loss.name) for loss in session.losses),
        class_names=session.train.records.class_names,
    )


def make_settings(config: RunConfig) -> Settings:
    return Settings(
        epochs=config.epochs,
        iterations=config.iter_per_epoch,
        lr=config.lr,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        lr_decay_epochs=tuple(config.lr_decay_epochs),
        lr_decay_gamma=config.lr_decay_gamma,
        warmup=config.warmup,
        clip_norm=config.clip_norm,
        freeze_bn=config.freeze_bn,
        precision=config.precision,
        seed=config.seed,
        save_minutes=config.save_minutes,
    )


def make_evaluate(session: Session, loader: ImageLoader, prefix: str = "") -> Callable[[nn.Module], dict[str, float]]:
    """network -> {"recall@K": fraction}, on the images of a loader."""
    config, records = session.config, loader.records

    def evaluate(network: nn.Module) -> dict[str, float]:
        batches = loader.test(config.batch)
        total = -(-len(records) // config.batch)
        vectors = embed(
            network, batches, device=session.device, precision=config.precision, progress="evaluating", total=total
        )
        metrics, _ = evaluate_retrieval(vectors, config.recall, query=records.query, gallery=records.gallery)
        return {f"{prefix}{key}": value for key, value in metrics.items()}

    return evaluate


def _train_classes(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    if is_number(text):
        return int(text)
    return [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]


def run_of(path: str) -> RunDirectory:
    """The run to which a directory or a checkpoint in it belongs."""
    return RunDirectory(path if Path(path).is_dir() else Path(path).parent)


def with_checkpoints(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """What a checkpoint says of its network, and a run to evaluate of its data, replaces the defaults.

    Flags that contradict a checkpoint are kept here and refused when it is loaded.
    """
    if isinstance(config, DistillConfig) and config.teacher_load is not None:
        config = _adopt(config, config.teacher_load, "teacher_", given, "teacher")
    if is_evaluation(config) and config.load is not None:
        config = _adopt(config, config.load, "", given, "checkpoint")
        stored = run_of(config.load).stored_config() or {}
        data = {key: stored[key] for key in ("dataset", "data", "train_classes", "recall") if key in stored}
        config = replace(config, **{key: value for key, value in data.items() if key not in given})
    return config


def _adopt(config: Any, path: str, prefix: str, given: frozenset[str], role: str) -> Any:
    content = read_checkpoint(path, role)
    if "network" not in content:
        return config
    spec = NetworkSpec.from_dict(content["network"])
    stored = {f"{prefix}{field}": getattr(spec, field) for field in NETWORK_FIELDS}
    return replace(config, **{key: value for key, value in stored.items() if key not in given})


def _given_fields(config: RunConfig, given: frozenset[str], prefix: str) -> dict[str, Any]:
    """Fields of the network's spec that the user set, for the check against a checkpoint; its size may differ."""
    return {
        field: getattr(config, f"{prefix}{field}")
        for field in NETWORK_FIELDS
        if f"{prefix}{field}" in given and field != "input_size"
    }


def _spec(config: RunConfig, prefix: str, pixels: Pixels) -> NetworkSpec:
    """The network that the flags describe; with the prefix teacher_ the teacher."""
    return NetworkSpec(**{field: getattr(config, f"{prefix}{field}") for field in NETWORK_FIELDS}, pixels=pixels)


def _teacher(config: RunConfig, given: frozenset[str]) -> Network | None:
    if not isinstance(config, DistillConfig):
        return None
    assert config.teacher_load is not None
    fallback = _spec(config, "teacher_", default_pixels(config.teacher_base) or Pixels())
    return restore_network(config.teacher_load, fallback, _given_fields(config, given, "teacher_"), "teacher")


def _student(config: RunConfig, given: frozenset[str], records: ImageRecords, notes: list[str]) -> Network:
    spec = _spec(config, "", default_pixels(config.base) or _pixels_of(records))
    if is_evaluation(config):
        assert config.load is not None
        return restore_network(config.load, spec, _given_fields(config, given, ""))
    network = build_network(spec)
    if config.load is None:
        notes.append(load_pretrained(network, config.pretrained))
    else:
        notes.append(_start_from(network, config.load))
    return network


def _start_from(network: Network, path: str) -> str:
    """Load what fits of a checkpoint, and say what did not and what stays random."""
    weights = read_checkpoint(path)["model"]
    left = load_weights(network, weights, strict=False)
    missing = [name for name in network.state_dict() if name not in weights or name in left]
    parts = [
        f"{len(names)} tensors {what} ({names[0]}, ...)"
        for names, what in ((left, "left out"), (missing, "random"))
        if names
    ]
    return ", ".join([f"started from {path}", *parts])


def _pixels_of(records: ImageRecords) -> Pixels:
    return Pixels() if records.mean is None or records.std is None else Pixels(records.mean, records.std)


def _loaders(
    config: RunConfig, splits: Splits, evaluating: bool
) -> tuple[ImageLoader, ImageLoader | None, ImageLoader]:
    fit, validation = splits.train, None
    if config.select == "val" and not evaluating:
        fit, validation = hold_out_classes(splits.train)
    assert config.input_size is not None
    size = config.input_size
    common: dict[str, Any] = {
        "seed": config.seed,
        "workers": config.workers,
        "skip_unreadable": config.skip_unreadable,
        "pin_memory": config.device != "cpu" and torch.cuda.is_available(),
        "progress": distributed.is_main(),
    }
    test_only = Geometry(input_size=size, flip=False)
    other = config.teacher_input_size if isinstance(config, DistillConfig) else None
    other = None if other == size else other
    test = ImageLoader(splits.test, test_only, **common)
    if evaluating:
        return test, None, test
    held = None if validation is None else ImageLoader(validation, test_only, **common)
    return ImageLoader(fit, Geometry(input_size=size, teacher_input_size=other, flip=fit.flip), **common), held, test
