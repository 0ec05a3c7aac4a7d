"""Every spelling of an objective folded into one list: --loss, the seed's ratio flags, --margin and --sample."""

from dataclasses import replace
from typing import Any

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.cli.config import DistillConfig, GranularityConfig, ProbeConfig, RunConfig, TrainConfig
from metric_kd.errors import UserError
from metric_kd.losses.objective import LossSpec, option_names, parse_loss
from metric_kd.losses.samplers import SAMPLERS
from metric_kd.losses.term import TERMS


def fold(config: RunConfig) -> RunConfig:
    """The same config with its whole objective in ``loss``, in the one canonical spelling.

    Folding twice changes nothing, so that a saved config.yaml means what its run did.
    """
    if isinstance(config, GranularityConfig):
        return config  # what it minimises is no choice
    losses = [_on_logits(parse_loss(text), config) for text in config.loss or []]
    if isinstance(config, ProbeConfig):
        return replace(config, loss=[str(loss) for loss in losses or [_on_logits(parse_loss("cross_entropy"), config)]])
    if isinstance(config, TrainConfig):
        usual = "cross_entropy" if config.task == "classification" else "l2_triplet"
        losses = losses or [_on_logits(parse_loss(usual), config)]
        defaults = {"margin": config.margin, "sample": config.sample}
        return replace(config, loss=[str(_with_defaults(loss, defaults)) for loss in losses])
    assert isinstance(config, DistillConfig)
    losses += [loss for loss in _from_ratios(config) if loss.weight != 0]
    if config.imitate is not None:
        losses = [_imitation(config, losses)]
    if config.fit_head is not None and config.task == "classification" and not losses:
        losses = [_on_logits(parse_loss("cross_entropy"), config)]
    if config.mutual:
        if config.task == "classification" and all(TERMS[loss.name].reads_teacher for loss in losses):
            losses.insert(0, _on_logits(parse_loss("cross_entropy"), config))
        if not any(TERMS[loss.name].reads_teacher for loss in losses):
            losses.append(parse_loss("dml"))
    if not any(loss.weight for loss in losses):
        usual = "--dist_ratio 1 --angle_ratio 2"
        if config.task == "classification":
            usual = "--loss cross_entropy:1 --loss st:0.1"
        raise UserError(f"nothing to learn from: give {usual}, or any --loss name:weight (`metric-kd list methods`).")
    if config.granularity is not None and not any(loss.name == "granularity" for loss in losses):
        losses.append(parse_loss("granularity"))
    folded: dict[str, Any] = dict.fromkeys(
        ("triplet_ratio", "dist_ratio", "angle_ratio", "dark_ratio", "at_ratio", "fitnet_ratio"), 0.0
    )
    defaults = {"margin": config.triplet_margin, "sample": config.triplet_sample}
    return replace(config, loss=[str(_with_defaults(loss, defaults)) for loss in losses], **folded)


def losses_of(config: RunConfig) -> list[LossSpec]:
    """The objective of a folded config."""
    return [parse_loss(text) for text in config.loss or []]


def _on_logits(loss: LossSpec, config: RunConfig) -> LossSpec:
    """Cross entropy reads the classifier of a network that has one, instead of training its own."""
    classifies = config.task == "classification" or config.classifier
    if classifies and loss.name == "cross_entropy":
        return loss._replace(options={"features": "logits", **loss.options})
    return loss


def _imitation(config: DistillConfig, losses: list[LossSpec]) -> LossSpec:
    """The one loss of --imitate."""
    options = {"layer": config.imitate} | ({"teacher_layer": config.teacher_layer} if config.teacher_layer else {})
    only = LossSpec("imitate", 1.0, options)
    if any(loss != only for loss in losses):
        raise UserError(
            f"--imitate {config.imitate} learns the teacher's feature and nothing else; leave the other losses out, or give "
            f"--loss imitate:1,layer={config.imitate} among them instead."
        )
    return only


def _with_defaults(loss: LossSpec, defaults: dict[str, object]) -> LossSpec:
    known = option_names(loss.name)
    if "sample" not in known:  # --margin and --sample speak of triplets; other losses have margins of their own
        return loss
    options = {key: value for key, value in defaults.items() if key in known} | loss.options
    SAMPLERS.canonical(str(options["sample"]))
    return loss._replace(options=options)


def _from_ratios(config: DistillConfig) -> list[LossSpec]:
    return [
        LossSpec("l2_triplet", config.triplet_ratio, {}),
        LossSpec("rkd_distance", config.dist_ratio, {}),
        LossSpec("rkd_angle", config.angle_ratio, {}),
        LossSpec("dark_rank", config.dark_ratio, {"alpha": config.dark_alpha, "beta": config.dark_beta}),
        LossSpec("at", config.at_ratio, {"reduction": "sum"}),
        LossSpec("fitnet", config.fitnet_ratio, {}),
    ]
