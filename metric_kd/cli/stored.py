"""What a checkpoint, or the run to which it belongs, says of a config: its network and its data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from metric_kd.cli.config import (
    NETWORK_FIELDS,
    DistillConfig,
    GranularityConfig,
    ProbeConfig,
    RunConfig,
    array_of,
    fit_head_of,
    is_evaluation,
)
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.errors import UserError
from metric_kd.models.network import NetworkSpec


def run_of(path: str) -> RunDirectory:
    """The run to which a directory or a checkpoint in it, or in its record of weights, belongs."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return RunDirectory(folder.parent if folder.name == "weights" and not (folder / "config.yaml").exists() else folder)


def find_network(path: str) -> Path:
    """The checkpoint of a teacher. Raises ``UserError`` for a file of embeddings, which cannot be shown other images."""
    file = find_checkpoint(path, "teacher")
    if file.suffix == ".npy":
        raise UserError(f"the teacher {path} is a file of embeddings; name a network, as in --against RUN_OR_FILE.")
    return file


def with_checkpoints(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """What a checkpoint says of its network, and a run to evaluate of its data, replaces the defaults.

    Flags that contradict a checkpoint are kept here and refused when it is loaded.
    """
    if isinstance(config, DistillConfig) and config.teacher_load is not None and array_of(config) is None:
        config = _adopt(config, config.teacher_load, "teacher_", given, "teacher")
    if isinstance(config, GranularityConfig) and config.teacher_load is not None:
        teacher = config.teacher_load
        config = _with_data_of(_adopt(config, teacher, "", given, "teacher"), teacher, given)
    if isinstance(config, ProbeConfig) and config.load is not None:
        config = _adopt(config, config.load, "", given, "checkpoint")
    if is_evaluation(config) and config.load is not None:
        load = config.load
        config = _with_data_of(_adopt(config, load, "", given, "checkpoint"), load, given)
    if fit_head_of(config) is not None and config.load is not None and not is_evaluation(config):
        config = _with_layer(_adopt(config, config.load, "", given, "checkpoint"))
    return config


def _with_layer(config: Any) -> Any:
    """--fit_head auto as the layer that the run of --load has imitated."""
    if config.fit_head != "auto":
        return config
    layer = (run_of(config.load).stored_config() or {}).get("imitate")
    if layer is None:
        raise UserError(f"--fit_head auto: {config.load} is no run of --imitate; name the layer, as in --fit_head fc1.")
    return replace(config, fit_head=layer)


def _with_data_of(config: Any, path: str, given: frozenset[str]) -> Any:
    """The data on which a run was trained, where the flags do not say another."""
    stored = run_of(path).stored_config() or {}
    keys = {"task", "classifier", "dataset", "data", "labels", "train_classes", "recall", "top", "nested"}
    if stored.get("unlabelled"):
        if not given & {"dataset", "data"}:
            raise UserError(
                f"{path} was trained without labels, so its images have none to measure by; name images with classes, as in "
                "--dataset folder --data DIR."
            )
        keys.remove("data")
    return replace(config, **{key: stored[key] for key in sorted(keys) if key in stored and key not in given})


def _adopt(config: Any, path: str, prefix: str, given: frozenset[str], role: str) -> Any:
    content = read_checkpoint(path, role)
    if "network" not in content:
        return config
    spec = NetworkSpec.from_dict(content["network"])
    stored = {f"{prefix}{field}": getattr(spec, field) for field in NETWORK_FIELDS}
    return replace(config, **{key: value for key, value in stored.items() if key not in given})
