"""Tasks: what one training step computes. The trainer knows none of this; it calls the task and steps.

The same step trains embeddings and classifiers: what is compared is a matter of the objective's terms, and how the
result is measured a matter of the evaluation.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.errors import UserError
from metric_kd.losses.objective import LossSpec, Objective
from metric_kd.losses.term import TERMS, Pair, PairTerm, Stage, Term
from metric_kd.models.network import Network
from metric_kd.types import Batch, Output


class ParameterGroup(dict[str, Any]):
    """A group for the optimiser: "params", and "own_lr", the group's rate where it is not the run's."""


class Viewed:
    """A network as terms may call it: under the precision of the run. ``network`` is the module itself."""

    def __init__(self, network: Network, precision: str):
        self.network, self.precision = network, precision

    def __call__(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        with autocast(images.device, self.precision):
            output: Output = self.network(images, want=want)
        return output


class Solo(nn.Module):
    """Train one student by an objective that may also read a frozen teacher.

    The student and the terms' own parts are submodules, so one DDP wrapper and one state dict hold them; the teacher is
    neither trained nor saved and stays outside.
    """

    def __init__(self, student: Network, teacher: Network | None, objective: Objective, precision: str = "fp32"):
        super().__init__()
        self.student = student
        self.objective = objective
        self.precision = precision
        self.loss_names = objective.names
        self._frozen = (teacher,)  # in a tuple: not a submodule
        self._pair: Pair | None = None
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> Network | None:
        return self._frozen[0]

    @property
    def networks(self) -> dict[str, Network]:
        """What is trained, by name; the result of the run is the student."""
        return {"student": self.student}

    @property
    def acting(self) -> list[str]:
        """Names of the losses that act at present."""
        return list(self.objective.acting)

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Create the terms' trained parts from the outputs for the images of ``example`` (two or more).

        labels: (M,) of all training images, for terms that remember them.
        """
        for name, term in self.objective.terms.items():
            if example.teacher_images is not None and getattr(term, "same_images", False):
                raise UserError(
                    f"loss {name!r} compares the networks pixel by pixel, but the teacher sees images of another size; "
                    "give both the same --input_size."
                )
        wanted, taught = self.objective.all_needs
        mode = self.student.training
        self.student.eval()
        with torch.no_grad():
            student = self.student(example.images, want=wanted)
            teacher = self._teach(example, taught)
            if self.teacher is not None and teacher is not None:
                scale = self.teacher.pixel_scale.to(example.images.device)
                bgr = self.teacher.spec.pixels is not None and self.teacher.spec.pixels.bgr
                self._pair = Pair(
                    Viewed(self.student, self.precision),
                    Viewed(self.teacher, self.precision),
                    scale.flip(1) if bgr else scale,
                    (example.labels if labels is None else labels).to(example.images.device),
                    num_classes,
                    student,
                    teacher,
                    example,
                )
            self.objective.build(student, teacher, num_classes, self._pair)
        self.student.train(mode)

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
        objective = self.objective
        if objective.differentiates:
            batch = with_leaves(batch)
        with autocast(batch.images.device, self.precision):
            teacher = self._teach(batch, objective.teacher_needs, graph=objective.differentiates)
            student = self.student(batch.images, want=objective.student_needs) if objective.runs_student else None
        pair = None
        if self._pair is not None and student is not None and teacher is not None:
            pair = self._pair._replace(student_output=student, teacher_output=teacher, batch=batch)
        result: tuple[Tensor, dict[str, Tensor]] = objective(student, teacher, batch, pair)
        return result

    def _teach(self, batch: Batch, needs: tuple[str, ...], graph: bool = False) -> Output | None:
        if self.teacher is None or not needs:
            return None
        images = batch.images if batch.teacher_images is None else batch.teacher_images
        with torch.set_grad_enabled(graph):
            output: Output = self.teacher(images, want=needs)
        return output


class Mutual(nn.Module):
    """Train several networks at once, each of which learns from the labels and from the others (deep mutual learning).

    Every term that reads a teacher is evaluated for every ordered pair of networks, the other's output being constant,
    and averaged over the others; all networks see the same batch, and all losses come from the outputs before the step
    (the synchronous form). No gradient passes between networks, so the sum of the losses trains each as its own loss
    would. Zhang et al.: Deep Mutual Learning, 2017, arXiv 1706.00384; there the updates alternate.

    networks: name -> network, the first being the student. Raises ``UserError`` for terms with stages of their own,
    with a view of both networks, or that differentiate the networks.
    """

    def __init__(self, networks: dict[str, Network], losses: Sequence[LossSpec], precision: str = "fp32"):
        super().__init__()
        if len(networks) < 2:
            raise UserError("mutual learning needs two networks or more; name a peer, as in --mutual resnet20.")
        self.peers = nn.ModuleDict(networks)
        self.precision = precision
        losses = [loss for loss in losses if loss.weight]
        for loss in losses:
            _check_mutual(loss.name, TERMS[loss.name](**loss.options))
        alone = [loss for loss in losses if not TERMS[loss.name].reads_teacher]
        between = [loss for loss in losses if TERMS[loss.name].reads_teacher]
        if not between:
            raise UserError("the networks learn nothing from each other; add a loss between them, as in --loss dml:1.")
        others = len(networks) - 1
        shared = [loss._replace(weight=loss.weight / others) for loss in between]
        self.between = nn.ModuleDict({f"{k}_from_{j}": Objective(shared) for k in networks for j in networks if j != k})
        self.alone = nn.ModuleDict({k: Objective(alone) for k in networks} if alone else {})
        self.loss_names = [f"{k}_{name}" for k in networks for name in self._names(k)]

    @property
    def networks(self) -> dict[str, Network]:
        """What is trained, by name; the result of the run is the first."""
        return {name: network for name, network in self.peers.items() if isinstance(network, Network)}

    @property
    def student(self) -> Network:
        return next(iter(self.networks.values()))

    @property
    def acting(self) -> list[str]:
        """Names of the losses that act at present."""
        return self.loss_names

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Create the terms' trained parts from the outputs for the images of ``example``."""
        modes = {name: network.training for name, network in self.networks.items()}
        self.peers.eval()
        with torch.no_grad():
            outputs = self._outputs(example)
            for k, j, objective in self._taught():
                objective.build(outputs[k], outputs[j], num_classes)
            for k, objective in self._untaught():
                objective.build(outputs[k], None, num_classes)
        for name, network in self.networks.items():
            network.train(modes[name])

    def stages(self) -> list[tuple[str, Stage]]:
        return []

    def enter(self, stage: tuple[str, Stage] | None) -> None:
        for objective in self._objectives():
            objective.enter(None)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        for objective in self._objectives():
            objective.begin_epoch(epoch, epochs)

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group per network, as many independent optimisers would have, and those of the terms."""
        groups = [ParameterGroup(params=_trained(network.parameters())) for network in self.networks.values()]
        return [*groups, *(group for group in grouped([], self._objectives()) if group["params"])]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(batch.images.device, self.precision):
            outputs = self._outputs(batch)
        totals: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for k, objective in self._untaught():
            total, own = objective(outputs[k], None, batch)
            totals.append(total)
            values |= {f"{k}_{name}": value for name, value in own.items()}
        for k, j, objective in self._taught():
            total, own = objective(outputs[k], detached(outputs[j]), batch)
            totals.append(total)
            for name, value in own.items():
                share = value / (len(self.peers) - 1)
                values[f"{k}_{name}"] = values[f"{k}_{name}"] + share if f"{k}_{name}" in values else share
        return torch.stack(totals).sum(), {name: values[name] for name in self.loss_names}

    def _outputs(self, batch: Batch) -> dict[str, Output]:
        needs = tuple(sorted({need for objective in self._objectives() for need in objective.all_needs[0]}))
        return {name: network(batch.images, want=needs) for name, network in self.networks.items()}

    def _names(self, k: str) -> list[str]:
        return list(dict.fromkeys([*_names_of(self.alone, k), *_names_of(self.between, f"{k}_from_{self._other(k)}")]))

    def _other(self, k: str) -> str:
        return next(name for name in self.peers if name != k)

    def _taught(self) -> list[tuple[str, str, Objective]]:
        return [
            (k, j, objective)
            for k in self.peers
            for j in self.peers
            if j != k and isinstance(objective := self.between[f"{k}_from_{j}"], Objective)
        ]

    def _untaught(self) -> list[tuple[str, Objective]]:
        return [(k, objective) for k, objective in self.alone.items() if isinstance(objective, Objective)]

    def _objectives(self) -> list[Objective]:
        return [*(objective for _, objective in self._untaught()), *(objective for _, _, objective in self._taught())]


def _names_of(objectives: nn.ModuleDict, key: str) -> list[str]:
    objective = objectives[key] if key in objectives else None
    return objective.names if isinstance(objective, Objective) else []


def _check_mutual(name: str, term: Term) -> None:
    if isinstance(term, PairTerm):
        raise UserError(f"loss {name!r} asks a fixed teacher and cannot teach both ways; leave it out of --mutual.")
    if term.differentiates or term.stages() or not term.acts_in_main:
        raise UserError(
            f"loss {name!r} has stages or gradients of its own and cannot teach both ways; leave it out of --mutual."
        )


def detached(output: Output) -> Output:
    """The same output as a constant."""
    return Output(
        *(
            tuple(t.detach() for t in field)
            if isinstance(field, tuple)
            else {key: t.detach() for key, t in field.items()}
            if isinstance(field, dict)
            else None
            if field is None
            else field.detach()
            for field in output
        )
    )


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
        for key, term in objective.terms.items():
            parameters = list(term.parameters())
            rate = getattr(term, "learning_rate", None)
            if objective.stage is not None and objective.stage[0] != key:
                continue
            if rate is None:
                shared += parameters
            else:
                own.append(ParameterGroup(params=_trained(parameters), own_lr=rate))
    return [ParameterGroup(params=_trained(shared)), *own]


def _trained(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
