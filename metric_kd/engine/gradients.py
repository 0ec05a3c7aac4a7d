"""The share of every loss in the gradient, averaged over an epoch, so that weights can be judged (--log_gradients)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metric_kd.distributed import average
from metric_kd.engine.logging import RunningMeans
from metric_kd.engine.tasks import Solo, Task
from metric_kd.errors import UserError


class GradientShares(RunningMeans):
    """Means over the measured steps of norm_k / sum_j norm_j (:func:`metric_kd.losses.gradients.gradient_norms`).

    Every ``every``-th step is measured, 0: none; the gradients of the step are those of one that is not. Of several batches
    in a step the norms are added, of several processes the shares averaged. A step in which no loss has a gradient counts
    as shares of 0. Raises ``UserError`` for a task without one objective.
    """

    def __init__(self, task: Task, every: int, device: torch.device):
        if every and not isinstance(task, Solo):
            raise UserError("--log_gradients measures the losses of one student; leave it out.")
        self.objective = task.objective if isinstance(task, Solo) else None
        super().__init__(len(task.loss_names), device)
        self.every = every

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Around the forward and backward passes of a step, counted from 1."""
        if not self.every or step % self.every or self.objective is None:
            yield
            return
        self.objective.norms = []
        try:
            yield
            norms = torch.stack(self.objective.norms).sum(0)
        finally:
            self.objective.norms = None
        total = norms.sum()
        self.sums += torch.where(total > 0, norms / torch.where(total > 0, total, 1.0), 0.0)
        self.count += 1

    def means(self) -> dict[str, float]:
        """Loss -> its share, of all processes, which call this together; empty where no step was measured."""
        if not self.count or self.objective is None:
            return {}
        return dict(zip(self.objective.names, (average(self.sums) / self.count).tolist(), strict=True))

    def record(self, acting: Iterable[str]) -> dict[str, Any]:
        """What metrics.jsonl has of it: {"gradient_shares": {loss: share}} of the losses that act, or nothing."""
        means = self.means()
        return {"gradient_shares": {name: means[name] for name in acting}} if means else {}
