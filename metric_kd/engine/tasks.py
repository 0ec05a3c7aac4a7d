"""Tasks: what one training step computes. The trainer knows none of this; it calls the task and steps."""

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.losses.objective import Objective
from metric_kd.models.network import Network
from metric_kd.types import Batch, Output


class Embedding(nn.Module):
    """Train a student's embedding by an objective that may also read a frozen teacher.

    ``forward(batch)`` gives (loss, {term: value}). The student and the terms' own parts are submodules, so one DDP
    wrapper and one state dict hold them; the teacher is neither trained nor saved and stays outside.
    """

    def __init__(self, student: Network, teacher: Network | None, objective: Objective, precision: str = "fp32"):
        super().__init__()
        self.student = student
        self.objective = objective
        self.precision = precision
        self._frozen = (teacher,)  # in a tuple: not a submodule
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> Network | None:
        return self._frozen[0]

    def build(self, example: Batch, num_classes: int) -> None:
        """Create the terms' trained parts from the outputs for the images of ``example`` (two or more)."""
        mode = self.student.training
        self.student.eval()
        with torch.no_grad():
            student = self.student(example.images, want=self.objective.student_needs)
            self.objective.build(student, self._teach(example), num_classes)
        self.student.train(mode)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        device = batch.images.device
        with autocast(device, self.precision):
            teacher = self._teach(batch)
            student = self.student(batch.images, want=self.objective.student_needs)
        return self.objective(student, teacher, batch)

    def _teach(self, batch: Batch) -> Output | None:
        needs = self.objective.teacher_needs
        if self.teacher is None or not needs:
            return None
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        with torch.no_grad():
            output: Output = self.teacher(images, want=needs)
        return output
