"""What a run is for: embeddings that retrieve unseen classes, or a classifier of known ones.

A goal says how data are split, which head a network has, how batches are drawn and what is measured. The step itself
(:mod:`metric_kd.engine.tasks`) is the same for both.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from metric_kd import distributed
from metric_kd.cli.config import NETWORK_FIELDS, RunConfig
from metric_kd.cli.nested import check_width, key_of, nested_keys, prefix_of, prefixes_of
from metric_kd.cli.unlabelled import Unlabelled, is_unlabelled, load_unlabelled
from metric_kd.data import load_dataset
from metric_kd.data.batches import ClassBalancedBatches, ShuffledBatches
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords, Splits, hold_out_classes, hold_out_images
from metric_kd.distill.granularity import BRANCHES, Coders
from metric_kd.engine.coding import Decoded
from metric_kd.errors import UserError
from metric_kd.evaluation.classification import check_top, evaluate_classification
from metric_kd.evaluation.embed import Embeddings, embed
from metric_kd.evaluation.metrics import titles
from metric_kd.evaluation.reidentification import TITLES
from metric_kd.evaluation.retrieval import check_ks, check_metrics, evaluate_retrieval, gallery_size
from metric_kd.losses.objective import LossSpec, option_names
from metric_kd.models.backbone import Pixels
from metric_kd.models.network import Network, NetworkSpec
from metric_kd.types import Batch

Evaluate = Callable[[nn.Module], dict[str, float]]


class Goal(Protocol):
    """The goals below have these methods, and those of :mod:`metric_kd.cli.unlabelled` and ``imitating``."""

    def hold_out(self, train: ImageRecords) -> Splits:
        """(to fit, to select by) for ``--select val``."""
        ...

    def head(self, classes: int) -> dict[str, Any]:
        """Fields of :class:`NetworkSpec` that follow from the goal, for that many training classes."""
        ...

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> Any:
        """Which images make a batch."""
        ...

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        """Metric -> its name for people; the first is the one to select by. cameras: whether the test images have them."""
        ...

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        """Refuse metrics that these test images, or this network, cannot give."""
        ...

    def evaluate(self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = "") -> Evaluate:
        """network -> {metric: fraction} on the images of a loader; all processes call it, the main one gets the metrics."""
        ...


class Retrieval:
    """Embeddings, measured by Recall@K on classes that were not trained on.

    classifier: whether networks also tell the training classes apart, for losses that read logits.
    """

    def __init__(self, classifier: bool = False):
        self.classifier = classifier

    def hold_out(self, train: ImageRecords) -> Splits:
        return hold_out_classes(train)

    def head(self, classes: int) -> dict[str, Any]:
        return {"num_classes": classes} if self.classifier else {}

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> ClassBalancedBatches:
        return ClassBalancedBatches(
            records.labels,
            config.batch,
            config.num_image_per_class,
            config.iter_per_epoch or 100,
            config.seed,
            rank=distributed.rank(),
            world=distributed.world_size(),
            pairs=any("sample" in option_names(loss.name) for loss in losses),
            class_names=records.class_names,
        )

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        # Recall@K counts another image by the query's own camera as a hit, so it stands behind where there are cameras.
        hits = {f"recall@{k}": f"Recall@{k}" for k in config.recall}
        return {**(TITLES if cameras else {}), **hits, **titles(config.metrics), **nested_keys(config)}

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        check_ks(config.recall, gallery_size(len(records), records.query, records.gallery))
        check_metrics(config.metrics, records.labels, records.query, records.gallery)
        check_width(config, network)

    def evaluate(self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = "") -> Evaluate:
        def measure(network: nn.Module) -> dict[str, float]:
            batches, total = _part(loader, config.batch)
            vectors = embed(
                network,
                batches,
                device=device,
                precision=config.precision,
                progress="evaluating",
                total=total,
                shared=True,
            )
            if not distributed.is_main():
                return {}
            return {f"{prefix}{key}": value for key, value in self.metrics(config, loader, vectors).items()}

        return measure

    def metrics(self, config: RunConfig, loader: ImageLoader, vectors: Embeddings) -> dict[str, float]:
        """What the embeddings of a loader's images are worth."""
        records = loader.records
        sides: dict[str, Any] = {"query": records.query, "gallery": records.gallery}
        found = evaluate_retrieval(
            vectors, config.recall, **sides, cameras=records.cameras, metrics=config.metrics, seed=config.seed
        )[0]
        for length in prefixes_of(config):
            values, _ = evaluate_retrieval(prefix_of(config, vectors, length), config.recall, **sides)
            found |= {key_of(key, length): value for key, value in values.items()}
        return found


class Classification:
    """A classifier on the pooled feature, which is its embedding too; measured by top-K accuracy on known classes."""

    def hold_out(self, train: ImageRecords) -> Splits:
        return hold_out_images(train)

    def head(self, classes: int) -> dict[str, Any]:
        return {"num_classes": classes}

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> ShuffledBatches:
        return ShuffledBatches(
            len(records),
            config.batch,
            config.seed,
            rank=distributed.rank(),
            world=distributed.world_size(),
            iterations=config.iter_per_epoch,
        )

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        return {f"top{k}": f"Top-{k} accuracy" for k in config.top}

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        if network.spec.num_classes is None:
            raise UserError("the network is no classifier; evaluate it without --task classification.")
        if network.spec.num_classes != records.num_classes:
            raise UserError(
                f"the network tells {network.spec.num_classes} classes apart and the data has {records.num_classes}; "
                "give the data it was trained on (--dataset, --train_classes, --labels)."
            )
        check_top(config.top, records.num_classes)

    def evaluate(self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = "") -> Evaluate:
        def measure(network: nn.Module) -> dict[str, float]:
            batches, total = _part(loader, config.batch)
            metrics = evaluate_classification(
                network,
                batches,
                device=device,
                precision=config.precision,
                ks=config.top,
                progress="evaluating",
                total=total,
                shared=True,
            )
            return {f"{prefix}{key}": value for key, value in metrics.items()}

        return measure


class Decoding:
    """How well the decoders of a teacher's coders do what the teacher does: a goal's own metrics, of each branch.

    The images come in one order for all goals: once through all of them.
    """

    def __init__(self, goal: Goal, teacher: Network):
        self.goal, self.teacher = goal, teacher

    def hold_out(self, train: ImageRecords) -> Splits:
        return self.goal.hold_out(train)

    def head(self, classes: int) -> dict[str, Any]:
        return self.goal.head(classes)

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> ShuffledBatches:
        return Classification().batches(config, losses, records)

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        keys = self.goal.keys(config, cameras)
        return {
            f"{branch}_{key}": f"{title} of the {branch} decoder" for branch in BRANCHES for key, title in keys.items()
        }

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        self.goal.check(config, records, network)

    def evaluate(self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = "") -> Evaluate:
        of_a_network = self.goal.evaluate(config, device, loader)

        def measure(coders: nn.Module) -> dict[str, float]:
            assert isinstance(coders, Coders)
            return {
                f"{prefix}{branch}_{key}": value
                for branch in BRANCHES
                for key, value in of_a_network(Decoded(self.teacher, coders, branch)).items()
            }

        return measure


def _part(loader: ImageLoader, batch: int) -> tuple[Iterator[Batch], int]:
    """This process's part of the test batches, and about how many these are."""
    rank, world = distributed.rank(), distributed.world_size()
    return loader.test(batch, (rank, world)), -(-len(loader.records) // (batch * world))


def goal_of(config: RunConfig) -> Goal:
    """The goal that --task names."""
    if is_unlabelled(config):
        return Unlabelled()
    return Classification() if config.task == "classification" else Retrieval(config.classifier)


def load_splits(config: RunConfig) -> Splits:
    """Training and test images as the goal needs them."""
    if is_unlabelled(config):
        return load_unlabelled(config)
    return load_dataset(
        config.dataset,
        config.data,
        task=config.task,
        labels=config.labels,
        train_classes=_train_classes(config.train_classes),
    )


def network_spec(config: RunConfig, prefix: str, pixels: Pixels, head: dict[str, Any]) -> NetworkSpec:
    """The network that the flags describe; with the prefix teacher_ the teacher."""
    return NetworkSpec(
        **{field: getattr(config, f"{prefix}{field}") for field in NETWORK_FIELDS}, pixels=pixels, **head
    )


def is_number(text: str) -> bool:
    """Whether --train_classes gives a number and not a file."""
    return text.isascii() and text.isdecimal()


def _train_classes(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    if is_number(text):
        return int(text)
    return [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]
