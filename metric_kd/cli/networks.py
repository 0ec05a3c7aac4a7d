"""The networks that a config names: teacher, student and peers, from checkpoints, pretrained or random weights."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metric_kd import scratch
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
from metric_kd.cli.goals import network_spec
from metric_kd.data.records import ImageRecords
from metric_kd.distill.granularity import CodedTeacher, Coders
from metric_kd.engine.checkpoint import describe_mismatch, read_checkpoint, restore_network, write_checkpoint
from metric_kd.engine.coding import coded, coders_for
from metric_kd.engine.probing import probed
from metric_kd.errors import UserError
from metric_kd.models import default_pixels, load_pretrained
from metric_kd.models.backbone import Pixels
from metric_kd.models.layers import running_up_to
from metric_kd.models.network import Network, NetworkSpec, build_network, compare_state, load_weights


def _given_fields(config: RunConfig, given: frozenset[str], prefix: str) -> dict[str, Any]:
    """Fields of the network's spec that the user set, for the check against a checkpoint; its size may differ."""
    return {
        field: getattr(config, f"{prefix}{field}")
        for field in NETWORK_FIELDS
        if f"{prefix}{field}" in given and field != "input_size"
    }


def teacher_of(config: RunConfig, given: frozenset[str], head: dict[str, Any]) -> Network | CodedTeacher | None:
    """The teacher, with its coders where --granularity_load names them."""
    if not isinstance(config, DistillConfig) or config.mutual or config.teacher_load is None or array_of(config):
        return None
    fallback = network_spec(config, "teacher_", default_pixels(config.teacher_base) or Pixels(), head)
    teacher = restore_network(config.teacher_load, fallback, _given_fields(config, given, "teacher_"), "teacher")
    if config.granularity_load is None:
        return teacher
    return coded(teacher, config.granularity_load, stable=config.granularity == "mas")


def coders_of(
    config: GranularityConfig, given: frozenset[str], head: dict[str, Any], names: tuple[str, ...]
) -> tuple[Coders, Network]:
    """Coders to be fitted, and the teacher that the config names; classifiers must tell the classes of the data apart."""
    assert config.teacher_load is not None
    fallback = network_spec(config, "", default_pixels(config.base) or Pixels(), head)
    teacher = restore_network(config.teacher_load, fallback, _given_fields(config, given, ""), "teacher")
    if "num_classes" in head and teacher.spec.num_classes is not None:
        check_classes(teacher, config.teacher_load, names, "give the data that it was trained on")
    decodes = "logits" if config.task == "classification" or config.classifier else "embedding"
    return coders_for(teacher, decodes, config.abstract_dim, config.detailed_dim), teacher


def check_classes(teacher: Network | CodedTeacher, path: str, names: tuple[str, ...], way_out: str) -> None:
    """Refuse a teacher, read from ``path``, whose logits speak of other classes than ``names``.

    A plain state dict does not name its classes; theirs are only counted.
    """
    theirs = teacher.spec.num_classes
    if theirs != len(names):
        raise UserError(f"the teacher tells {theirs} classes apart and the data has {len(names)}; {way_out}.")
    if read_checkpoint(path, "teacher").get("classes", list(names)) != list(names):
        raise UserError(f"the teacher tells other classes apart than the data has; {way_out}.")


def student_of(
    config: RunConfig, given: frozenset[str], records: ImageRecords, head: dict[str, Any], notes: list[str]
) -> Network:
    spec = network_spec(config, "", default_pixels(config.base) or _pixels_of(records), head)
    if is_evaluation(config):
        assert config.load is not None
        return restore_network(config.load, spec, _given_fields(config, given, ""))
    if isinstance(config, ProbeConfig):
        assert config.load is not None
        plain = replace(spec, num_classes=None)
        return probed(restore_network(config.load, plain, _given_fields(config, given, "")), head["num_classes"])
    network = build_network(spec)
    layer = fit_head_of(config)
    if layer is not None:
        assert config.load is not None
        _check_start(network, config.load, layer, _given_fields(config, given, ""))
    if config.student_init is not None:
        notes.append(_start_together(network, config.student_init, config.pretrained))
    elif config.load is None:
        notes.append(load_pretrained(network, config.pretrained))
    else:
        notes.append(_start_from(network, config.load))
    return network


def peers_of(config: RunConfig, records: ImageRecords, head: dict[str, Any]) -> dict[str, Network]:
    """The networks of --mutual, with the student's head and its size of images."""
    if not isinstance(config, DistillConfig):
        return {}
    peers = {}
    for k, base in enumerate(config.mutual, start=1):
        like = replace(config, base=base)
        peers[f"peer{k}"] = build_network(network_spec(like, "", default_pixels(base) or _pixels_of(records), head))
        load_pretrained(peers[f"peer{k}"], config.pretrained)
    return peers


def _start_together(network: Network, path: str, pretrained: str) -> str:
    """Start from the weights in a file, if it is there; see :func:`share_start`."""
    if not Path(path).exists():
        return f"{load_pretrained(network, pretrained)}; {path} will hold this start"
    try:
        load_weights(network, read_checkpoint(path, "start")["model"], strict=True)
    except UserError as error:
        raise UserError(f"--student_init {path} does not fit --base {network.spec.base}: {error}") from error
    return f"started from the shared weights {path}"


def share_start(network: Network, path: Path) -> None:
    """Write a network's weights to ``path``; where another run was faster, start from what it wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, own = scratch.create(path)
    os.close(handle)
    try:
        write_checkpoint(own, {"network": network.spec.to_dict(), "model": network.state_dict()})
        os.link(own, path)  # unlike a rename, this fails where the file exists
    except FileExistsError:
        load_weights(network, read_checkpoint(path, "start")["model"], strict=True)
    finally:
        own.unlink(missing_ok=True)


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


def _check_start(network: Network, path: str, layer: str, given: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks some of what runs up to a layer: it would stay random for ever."""
    content = read_checkpoint(path)
    if "network" in content:
        describe_mismatch(NetworkSpec.from_dict(content["network"]), given, "checkpoint")
    side = network.spec.input_size
    assert side is not None
    fixed = running_up_to(network, layer, torch.zeros(2, 3, side, side))
    missing, _, mismatched = compare_state(network, content["model"])
    for name in [*missing, *mismatched]:
        if name in fixed.parameters or name.rpartition(".")[0] in fixed.modules:
            raise UserError(
                f"--load {path} has no {name!r} that fits, which runs up to layer {layer!r} and would stay random; give the "
                "run whose layers are to be kept."
            )


def _pixels_of(records: ImageRecords) -> Pixels:
    return Pixels() if records.mean is None or records.std is None else Pixels(records.mean, records.std)
