"""Tasks: what one training step computes. The trainer knows none of this; it calls the task and steps.

The same step trains embeddings and classifiers: what is compared is a matter of the objective's terms, and how the
result is measured a matter of the evaluation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.distill.granularity import CodedTeacher, Coders
from metric_kd.engine.gathering import whole_batch
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective
from metric_kd.losses.term import Pair, Stage
from metric_kd.models.network import Network
from metric_kd.modes import eval_mode
from metric_kd.types import Batch, Output


class ParameterGroup(dict[str, Any]):
    """A group for the optimiser: "params", and "own_lr", the group's rate where it is not the run's."""


class AtPrecision:
    """A network as terms may call it: under the precision of the run. ``network`` is the module itself."""

    def __init__(self, network: Network | CodedTeacher, precision: str):
        self.network, self.precision = network, precision

    def __call__(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        with autocast(images.device, self.precision):
            output: Output = self.network(images, want=want)
        return output


class Task(nn.Module):
    """What the trainer asks of a task: ``task(batch)`` gives (loss, {name: value}), and what follows."""

    loss_names: list[str]
    student: Network | Coders
    """What is the result of the run: a network, or the coders of a teacher."""
    compiled: Mapping[nn.Module, Callable[..., Output]] = {}
    """The compiled forward passes of networks, which a training step takes instead (:mod:`metric_kd.engine.compiling`)."""

    def running(self, network: nn.Module) -> Callable[..., Output]:
        """How a training step calls a network: compiled, where that was asked for."""
        return self.compiled.get(network, network)

    @property
    def networks(self) -> dict[str, Network] | dict[str, Coders]:
        """What is trained, by name; "student" is the result of the run."""
        return {"student": self.student}  # type: ignore[return-value]

    @property
    def acting(self) -> list[str]:
        """Names of the losses that act at present."""
        return self.loss_names

    def stages(self) -> list[tuple[str, Stage]]:
        """What comes before the main stage."""
        return []

    def enter(self, stage: tuple[str, Stage] | None) -> None:
        """Begin one of :meth:`stages`, or with None the main stage."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set what depends on the epoch (from 1) of the main stage."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the present stage trains."""
        raise TypeError(f"{type(self).__name__} does not define parameter_groups().")


class Solo(Task):
    """Train one student by an objective that may also read a frozen teacher.

    The student and the terms' own parts are submodules, so one DDP wrapper and one state dict hold them; the teacher, or
    what is stored of it, is neither trained nor saved and stays outside. Where processes share a batch, terms that relate
    samples see all of it.
    """

    student: Network

    def __init__(
        self,
        student: Network,
        teacher: Network | CodedTeacher | StoredTeacher | None,
        objective: Objective,
        precision: str = "fp32",
    ):
        super().__init__()
        self.student = student
        self.objective = objective
        self.precision = precision
        self.loss_names = objective.names
        self._frozen = (teacher,)  # in a tuple: not a submodule
        self._pair: Pair | None = None
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> Network | CodedTeacher | StoredTeacher | None:
        return self._frozen[0]

    @property
    def acting(self) -> list[str]:
        """Names of the losses that act at present."""
        return list(self.objective.acting)

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Create the terms' trained parts from the outputs for the images of ``example`` (two or more).

        labels: (M,) of all training images, for terms that remember them.
        """
        for name, term in self.objective.items():
            if example.teacher_images is not None and term.same_images:
                raise UserError(
                    f"loss {name!r} compares the networks pixel by pixel, but the teacher sees images of another size; "
                    "give both the same --input_size."
                )
        wanted, taught = self.objective.all_needs
        with eval_mode(self.student), torch.no_grad():
            student = outputs_for(self.student, example.images, wanted)
            teacher = self._teach(example, taught)
            if isinstance(self.teacher, nn.Module) and teacher is not None:
                self._pair = Pair(
                    AtPrecision(self.student, self.precision),
                    AtPrecision(self.teacher, self.precision),
                    self.teacher.rgb_scale.to(example.images.device),
                    (example.labels if labels is None else labels).to(example.images.device),
                    num_classes,
                    student,
                    teacher,
                    example,
                )
            self.objective.build(student, teacher, num_classes, self._pair)
        if self.objective.differentiates:
            self._try_second_derivatives(example)

    def _try_second_derivatives(self, example: Batch) -> None:
        """Some activations (hardsigmoid in MobileNetV3) have none: refuse them before training."""
        try:
            with eval_mode(self), torch.enable_grad():
                total, _ = self(example)
                torch.autograd.grad(total, trainable(self.student.parameters()), allow_unused=True)
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            names = ", ".join(key for key, term in self.objective.items() if term.differentiates)
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"loss {names} takes gradients of gradients, which a layer of {self.student.spec.base} does not have "
                f"({reason}); choose another student or another loss."
            ) from error

    def stages(self) -> list[tuple[str, Stage]]:
        return self.objective.stages()

    def enter(self, stage: tuple[str, Stage] | None) -> None:
        self.objective.enter(stage)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        self.objective.begin_epoch(epoch, epochs)

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the present stage trains."""
        shared = [*self.student.parameters()] if self.objective.runs_student else []
        return grouped(shared, [self.objective])

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.objective.differentiates:
            batch = with_leaves(batch)
        teacher = self.teacher_output(batch)
        return self.compare(self.student_output(batch), teacher, batch)

    def student_output(self, batch: Batch) -> Output | None:
        """What the acting terms read from the student; None in a stage in which it rests."""
        if not self.objective.runs_student:
            return None
        with autocast(batch.images.device, self.precision):
            return self.running(self.student)(batch.images, want=self.objective.student_needs)

    def teacher_output(self, batch: Batch) -> Output | None:
        """What they read from the teacher; None where none does."""
        with autocast(batch.images.device, self.precision):
            return self._teach(batch, self.objective.teacher_needs, graph=self.objective.differentiates)

    def compare(self, student: Output | None, teacher: Output | None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of what both networks said of a batch: (weighted sum, {term: value})."""
        objective, pair = self.objective, None
        if self._pair is not None and student is not None and teacher is not None:
            pair = self._pair._replace(student_output=student, teacher_output=teacher, batch=batch)
        whole = whole_batch(objective, student, teacher, batch, pair)
        result: tuple[Tensor, dict[str, Tensor]] = objective(student, teacher, batch, pair, whole)
        return result

    def _teach(self, batch: Batch, needs: tuple[str, ...], graph: bool = False) -> Output | None:
        if self.teacher is None or not needs:
            return None
        if isinstance(self.teacher, StoredTeacher):
            return self.teacher.outputs_of(batch, needs)
        with torch.set_grad_enabled(graph):
            return self.running(self.teacher)(batch.seen_by_teacher, want=needs)


def outputs_for(network: Network, images: Tensor, want: tuple[str, ...]) -> Output:
    """What a network says of example images; ``UserError`` where it cannot take them."""
    try:
        output: Output = network(images, want=want)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{network.spec.base} cannot embed images of {images.shape[-1]} px ({reason}); change --input_size."
        ) from error
    return output


def with_leaves(batch: Batch) -> Batch:
    """The batch with float32 images of which gradients can be taken."""
    teacher_images = batch.teacher_images
    return batch._replace(
        images=batch.images.float().requires_grad_(),
        teacher_images=None if teacher_images is None else teacher_images.float().requires_grad_(),
    )


def grouped(shared: list[nn.Parameter], objectives: Sequence[Objective]) -> list[ParameterGroup]:
    """``shared`` and the parts of the acting terms in one group, and one more for each term with a rate of its own."""
    shared, own = list(shared), []
    for objective in objectives:
        for key, term in objective.items():
            parameters, rate = list(term.parameters()), term.learning_rate
            if objective.stage is not None and objective.stage[0] != key:
                continue
            if rate is None:
                shared += parameters
            else:
                own.append(ParameterGroup(params=trainable(parameters), own_lr=rate))
    return [ParameterGroup(params=trainable(shared)), *own]


def trainable(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
