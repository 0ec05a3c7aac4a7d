"""Peers: networks that are trained together and teach each other."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.distill.granularity import Encoders
from metric_kd.distributed import world_size
from metric_kd.engine.gathering import detached, gathered, gathered_batch
from metric_kd.engine.tasks import ParameterGroup, Task, grouped, outputs_for, trainable
from metric_kd.errors import UserError
from metric_kd.losses.objective import LossSpec, Objective
from metric_kd.losses.term import TERMS, PairTerm, Seen, Term
from metric_kd.models.network import Network
from metric_kd.modes import eval_mode
from metric_kd.types import Batch, Output


class Mutual(Task):
    """Train several networks at once, each of which learns from the labels and from the others (deep mutual learning).

    Every term that reads a teacher is evaluated for every ordered pair of networks, the other's output being constant,
    and averaged over the others; all networks see the same batch, and all losses come from the outputs before the step
    (the synchronous form). No gradient passes between networks, so the sum of the losses trains each as its own loss and
    its own optimiser would; gradients are clipped network by network. Zhang et al.: Deep Mutual Learning, 2017, arXiv
    1706.00384; there the updates alternate.

    networks: name -> network, the first being the student. rates: learning rates of networks where not the run's. Raises
    ``UserError`` for terms with stages of their own, with a view of both networks, or that differentiate the networks.

    encoders: name -> what sums up the pooled feature of that network, trained along with it and no part of it. The
    outputs then carry codes for :class:`~metric_kd.distill.granularity.Granularity`. (The multi-granularity form of
    arXiv 2108.06681; its terms between peers are averaged over the others like all.)
    """

    student: Network

    def __init__(
        self,
        networks: dict[str, Network],
        losses: Sequence[LossSpec],
        precision: str = "fp32",
        encoders: Mapping[str, Encoders] | None = None,
        rates: Mapping[str, float] | None = None,
    ):
        super().__init__()
        if len(networks) < 2:
            raise UserError("mutual learning needs two networks or more; name a peer, as in --mutual resnet20.")
        self.student, *_ = networks.values()
        self.peers = nn.ModuleDict({name: network for name, network in networks.items() if network is not self.student})
        self.encoders = nn.ModuleDict(encoders or {})
        self._names = list(networks)
        self._rates = dict(rates or {})
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
        self.loss_names = [f"{k}_{name}" for k in networks for name in self._losses(k)]

    @property
    def networks(self) -> dict[str, Network]:
        """What is trained, by name; the result of the run is the first."""
        peers = {name: network for name, network in self.peers.items() if isinstance(network, Network)}
        return {self._names[0]: self.student, **peers}

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Create the terms' trained parts from the outputs for the images of ``example``."""
        with eval_mode(*self.networks.values()), torch.no_grad():
            outputs = {
                k: self._coded(k, outputs_for(network, example.images, self._needs()))
                for k, network in self.networks.items()
            }
            for k, j, objective in self._taught():
                objective.build(outputs[k], outputs[j], num_classes)
            for k, objective in self._untaught():
                objective.build(outputs[k], None, num_classes)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        for objective in self._objectives():
            objective.begin_epoch(epoch, epochs)

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group per network, as many independent optimisers would have, and those of the terms."""
        groups = []
        for name, network in self.networks.items():
            group = ParameterGroup(params=trainable([*network.parameters(), *self._encoder_parameters(name)]))
            if name in self._rates:
                group["own_lr"] = self._rates[name]
            groups.append(group)
        return [*groups, *(group for group in grouped([], self._objectives()) if group["params"])]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(batch.images.device, self.precision):
            outputs = self._outputs(batch)
        whole, together = self._whole(outputs, batch)
        totals: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for k, objective in self._untaught():
            seen = Seen(whole[k], None, together) if together else None
            total, own = objective(outputs[k], None, batch, whole=seen)
            totals.append(total)
            values |= {f"{k}_{name}": value for name, value in own.items()}
        for k, j, objective in self._taught():
            seen = Seen(whole[k], detached(whole[j]), together) if together else None
            total, own = objective(outputs[k], detached(outputs[j]), batch, whole=seen)
            totals.append(total)
            for name, value in own.items():
                share = value / len(self.peers)
                values[f"{k}_{name}"] = values[f"{k}_{name}"] + share if f"{k}_{name}" in values else share
        return torch.stack(totals).sum(), {name: values[name] for name in self.loss_names}

    def _outputs(self, batch: Batch) -> dict[str, Output]:
        return {
            k: self._coded(k, self.running(network)(batch.images, want=self._needs()))
            for k, network in self.networks.items()
        }

    def _whole(self, outputs: dict[str, Output], batch: Batch) -> tuple[dict[str, Output], Batch | None]:
        """What terms that relate samples read of all processes, gathered once; None where one process has it all."""
        fields = {field for o in self._objectives() if o.related for needs in o.related_needs for field in needs}
        if world_size() == 1 or not fields:
            return {}, None
        whole = ((k, gathered(output, fields)) for k, output in outputs.items())
        return {k: output for k, output in whole if output is not None}, gathered_batch(batch)

    def _needs(self) -> tuple[str, ...]:
        return tuple(sorted({need for objective in self._objectives() for need in objective.student_needs}))

    def _coded(self, name: str, output: Output) -> Output:
        """The output of a network with the codes of its encoders, where it has them."""
        if name not in self.encoders or output.pooled is None:
            return output
        return output._replace(codes=self.encoders[name](output.pooled))

    def _encoder_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.encoders[name].parameters()) if name in self.encoders else []

    def _losses(self, k: str) -> list[str]:
        other = next(name for name in self._names if name != k)
        objectives = [objective for name, objective in self._untaught() if name == k]
        objectives += [objective for name, j, objective in self._taught() if (name, j) == (k, other)]
        return [name for objective in objectives for name in objective.names]

    def _taught(self) -> list[tuple[str, str, Objective]]:
        return [
            (k, j, objective)
            for k in self._names
            for j in self._names
            if j != k and isinstance(objective := self.between[f"{k}_from_{j}"], Objective)
        ]

    def _untaught(self) -> list[tuple[str, Objective]]:
        return [(k, objective) for k, objective in self.alone.items() if isinstance(objective, Objective)]

    def _objectives(self) -> list[Objective]:
        return [*(objective for _, objective in self._untaught()), *(objective for _, _, objective in self._taught())]


def _check_mutual(name: str, term: Term) -> None:
    if isinstance(term, PairTerm):
        raise UserError(f"loss {name!r} asks a fixed teacher and cannot teach both ways; leave it out of --mutual.")
    if term.differentiates or term.stages() or not term.acts_in_main:
        raise UserError(
            f"loss {name!r} has stages or gradients of its own and cannot teach both ways; leave it out of --mutual."
        )
