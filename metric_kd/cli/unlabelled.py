"""Distillation without labels (--unlabelled): any folder of images, and how much of the teacher's order the student has."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd import distributed
from metric_kd.cli.config import DistillConfig, RunConfig
from metric_kd.cli.losses import losses_of
from metric_kd.data.batches import ShuffledBatches
from metric_kd.data.folder import unlabelled
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords, Splits, hold_out_images
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.errors import UserError
from metric_kd.evaluation.agreement import NEIGHBOURS, check_count, neighbours_of, share_of
from metric_kd.evaluation.embed import embed
from metric_kd.losses.objective import LossSpec
from metric_kd.losses.term import TERMS
from metric_kd.models.network import Network

METRIC = f"neighbours@{NEIGHBOURS}"
SHARE, LEAST, MOST = 0.1, 50, 2000
"""Of the images, how many are held out: a share between two numbers, but no more than half of them."""


def load_unlabelled(config: RunConfig) -> Splits:
    """The images below --data to train on, and those that are held out to measure by."""
    return hold_out(unlabelled(config.data))


def hold_out(records: ImageRecords) -> Splits:
    """Images at equal distances in the sorted order of their paths. Raises ``UserError`` where they are too few."""
    held = min(max(round(SHARE * len(records)), LEAST), MOST, len(records) // 2)
    if held <= NEIGHBOURS:
        raise UserError(
            f"{len(records)} images are too few to train on and to hold {NEIGHBOURS + 1} out; give more images."
        )
    return hold_out_images(records, held / len(records))


class Unlabelled:
    """Embeddings that lie to each other as the teacher's do, measured on images that were held out.

    targets: loader -> the teacher's embeddings of its images (on the main process).
    """

    def __init__(self, targets: Mapping[ImageLoader, Tensor] | None = None):
        self.targets = targets or {}

    def hold_out(self, train: ImageRecords) -> Splits:
        return hold_out(train)

    def head(self, classes: int) -> dict[str, Any]:
        return {}

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> ShuffledBatches:
        rank, world = distributed.rank(), distributed.world_size()
        # A few images that are left over relate to nothing.
        return ShuffledBatches(
            len(records), config.batch, config.seed, rank, world, drop_last=True, iterations=config.iter_per_epoch
        )

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        return {METRIC: f"neighbours@{NEIGHBOURS} shared with the teacher"}

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        check_count(len(records))

    def evaluate(
        self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = ""
    ) -> Callable[[nn.Module], dict[str, float]]:
        main = distributed.is_main()
        target = neighbours_of(self.targets[loader]) if main else None

        def measure(network: nn.Module) -> dict[str, float]:
            vectors = _embedded(network, loader, config, device, "evaluating")
            if target is None:
                return {}
            return {f"{prefix}{METRIC}": share_of(neighbours_of(vectors), target)}

        return measure


def targets_of(
    config: RunConfig,
    teacher: nn.Module | StoredTeacher | None,
    held_out: Mapping[str, ImageLoader],
    device: torch.device,
) -> dict[ImageLoader, Tensor]:
    """What the teacher says of the held-out images; all processes call this, the main one gets it."""
    if not held_out:
        return {}
    if isinstance(teacher, StoredTeacher):
        return {loader: teacher.held_out[name] for name, loader in held_out.items()}
    assert teacher is not None
    title = "asking the teacher"
    return {loader: _embedded(teacher, loader, config, device, title, True) for loader in held_out.values()}


def _embedded(
    network: nn.Module, loader: ImageLoader, config: RunConfig, device: torch.device, title: str, teacher: bool = False
) -> Tensor:
    """The embeddings of the images of a loader, on the main process; of a teacher, in the size that it sees."""
    rank, world = distributed.rank(), distributed.world_size()
    batches = loader.test(config.batch, (rank, world))
    if teacher:
        batches = (batch._replace(images=batch.seen_by_teacher) for batch in batches)
    total = -(-len(loader.records) // (config.batch * world))
    return embed(
        network, batches, device=device, precision=config.precision, progress=title, total=total, shared=True
    ).vectors


def is_unlabelled(config: RunConfig) -> bool:
    return isinstance(config, DistillConfig) and config.unlabelled


def refusals(config: RunConfig) -> list[str]:
    """What --unlabelled does not go with, one sentence each."""
    if not isinstance(config, DistillConfig) or not config.unlabelled:
        return []
    sentences = []
    if config.dataset != "folder":
        sentences.append(f"--unlabelled takes any folder of images (--data); leave --dataset {config.dataset} out.")
    classes = {
        "task classification": config.task == "classification",
        "classifier": config.classifier,
        "train_classes": config.train_classes is not None,
        "metrics": config.metrics,
        "recall": config.recall != DistillConfig().recall,
        "labels": config.labels != DistillConfig().labels,
    }
    sentences += [f"--unlabelled knows no classes; leave --{flag} out." for flag, given in classes.items() if given]
    sentences += [
        f"--unlabelled compares a student's embeddings with those of a teacher; leave --{flag} out."
        for flag in ("mutual", "granularity", "imitate", "fit_head")
        if getattr(config, flag)
    ]
    if config.select == "test":
        sentences.append("--unlabelled has no test images to select by; give --select val (held-out images) or last.")
    for loss in losses_of(config):
        if loss.weight and TERMS[loss.name].reads_labels:
            sentences.append(
                f"loss {loss.name!r} reads labels, which --unlabelled does not have; leave it out, or give a loss of the "
                "teacher's embeddings, as in --loss rkd_distance:1."
            )
    return sentences
