"""How much of a teacher's feature a student gives: the share of its variance that is explained."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import with_bar
from metric_kd.models.layers import LAYER
from metric_kd.modes import eval_mode
from metric_kd.types import Batch


class Explained:
    """1 - sum_n |s_n - t_n|^2 / sum_n |t_n - mean t|^2 of features that come batch by batch; none is kept.

    1 where the student gives the teacher's feature, 0 where it does no better than the teacher's mean over the images,
    and below 0 where it does worse. Sums in float64, the second by the parallel form of Welford's algorithm, so that a
    large mean costs no digits. 0 where the teacher gives the same for all images.
    """

    def __init__(self) -> None:
        self.count = 0
        self._gap: Tensor | None = None
        self._spread: Tensor | None = None
        self._mean: Tensor | None = None

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """student, teacher: (N, ...) features of the same images."""
        ours, theirs = student.detach().flatten(1).double(), teacher.detach().flatten(1).double()
        gap = (ours - theirs).square().sum()
        mean = theirs.mean(0)
        spread = (theirs - mean).square().sum()
        total = self.count + len(theirs)
        if self._gap is None or self._spread is None or self._mean is None:
            self._gap, self._spread, self._mean = gap, spread, mean
        else:
            step = mean - self._mean
            self._gap = self._gap + gap
            self._spread = self._spread + spread + step.square().sum() * (self.count * len(theirs) / total)
            self._mean = self._mean + step * (len(theirs) / total)
        self.count = total

    def value(self) -> float:
        """The share; ``UserError`` where no features came."""
        if self._gap is None or self._spread is None:
            raise UserError("there are no images to compare features of; check that the data set is not empty.")
        spread = self._spread.item()
        return 1 - self._gap.item() / spread if spread > 0 else 0.0


def evaluate_imitation(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    layer: str,
    teacher_layer: str | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    progress: str | None = None,
    total: int | None = None,
) -> float:
    """:class:`Explained` of a layer's feature over all batches, both networks in eval mode meanwhile.

    layer, teacher_layer: by name (:mod:`metric_kd.models.layers`), the same by default. The teacher sees
    ``teacher_images`` where a batch has them. precision, progress, total: as :func:`~metric_kd.evaluation.embed.embed`.
    Raises ``UserError`` for an unknown layer or precision, and where there are no batches.
    """
    device = torch.device(device)
    ours, theirs = layer, teacher_layer or layer
    explained = Explained()
    with eval_mode(student, teacher), torch.inference_mode(), autocast(device, precision):
        for batch in with_bar(batches, progress, total):
            batch = batch.to(device)
            explained.add(
                student(batch.images, want=(f"{LAYER}{ours}",)).taps[ours],
                teacher(batch.seen_by_teacher, want=(f"{LAYER}{theirs}",)).taps[theirs],
            )
    return explained.value()
