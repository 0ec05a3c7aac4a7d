"""What a run of --imitate is for: the teacher's feature, whatever the labels say."""

from typing import Any

import torch
from torch import nn

from metric_kd.cli.config import DistillConfig, RunConfig
from metric_kd.cli.goals import Evaluate, Goal
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords, Splits
from metric_kd.evaluation.imitation import evaluate_imitation
from metric_kd.losses.objective import LossSpec
from metric_kd.models.network import Network


class Imitating:
    """A goal of which only the share of the teacher's feature that is explained can be measured, for what follows the layer
    is not trained; where the layer is the embedding, all else can be measured too and comes first.
    """

    def __init__(self, goal: Goal, teacher: nn.Module, layer: str, teacher_layer: str | None):
        self.goal, self.teacher, self.layer, self.teacher_layer = goal, teacher, layer, teacher_layer

    def hold_out(self, train: ImageRecords) -> Splits:
        return self.goal.hold_out(train)

    def head(self, classes: int) -> dict[str, Any]:
        return self.goal.head(classes)

    def batches(self, config: RunConfig, losses: list[LossSpec], records: ImageRecords) -> Any:
        return self.goal.batches(config, losses, records)

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        keys = {"explained": f"share of the teacher's {self.teacher_layer or self.layer} explained"}
        return {**self.goal.keys(config, cameras), **keys} if self._retrieves(config) else keys

    def check(self, config: RunConfig, records: ImageRecords, network: Network) -> None:
        self.goal.check(config, records, network)

    def evaluate(self, config: RunConfig, device: torch.device, loader: ImageLoader, prefix: str = "") -> Evaluate:
        usual = self.goal.evaluate(config, device, loader, prefix)

        def measure(network: nn.Module) -> dict[str, float]:
            share = evaluate_imitation(
                network,
                self.teacher,
                loader.test(config.batch),
                self.layer,
                self.teacher_layer,
                device=device,
                precision=config.precision,
                progress="comparing",
                total=-(-len(loader.records) // config.batch),
            )
            return {**(usual(network) if self._retrieves(config) else {}), f"{prefix}explained": share}

        return measure

    def _retrieves(self, config: RunConfig) -> bool:
        return config.task == "embedding" and self.layer == "embedding"


def imitating(config: RunConfig, goal: Goal, teacher: nn.Module | None) -> Goal:
    """The goal, or with --imitate what of it can be measured."""
    if not isinstance(config, DistillConfig) or config.imitate is None or teacher is None:
        return goal
    return Imitating(goal, teacher, config.imitate, config.teacher_layer)
