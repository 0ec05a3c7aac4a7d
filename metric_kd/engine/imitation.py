"""Feature imitation and what follows it: a student learns one layer of its teacher, then the layers after it learn the task.

Cheng, Rao, Chen, Zhang: Explaining Knowledge Distillation by Quantifying the Knowledge, 2020, arXiv 2003.03622.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from metric_kd.devices import autocast
from metric_kd.distill.granularity import CodedTeacher
from metric_kd.engine.tasks import Solo
from metric_kd.errors import UserError
from metric_kd.losses.objective import Objective
from metric_kd.models.layers import UpTo, running_up_to
from metric_kd.models.network import Network
from metric_kd.types import Batch, Output


class Imitation(Solo):
    """Train a student by the feature of a frozen teacher, one forward pass of each in a step.

    The student is in eval mode but for its normalisation: with dropout, it could not give what a teacher without gives.
    Deviation from the paper's program, in which dropout acts and a second forward pass updates the statistics again.
    """

    def train(self, mode: bool = True) -> "Imitation":
        super().train(mode)
        self.student.eval()
        for module in self.student.modules():
            if isinstance(module, _NormBase):
                module.train(mode)
        return self


class HeadFit(Solo):
    """Train what comes after a layer; everything that runs up to it is frozen, statistics and dropout included.

    layer: by its name (:mod:`metric_kd.models.layers`); where it runs is found on the example images of :meth:`build`.
    Deviations from the paper's program: there, batch normalisation went on updating its statistics in the frozen part, and
    the result was not saved.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | CodedTeacher | None,
        objective: Objective,
        layer: str,
        precision: str = "fp32",
    ):
        super().__init__(student, teacher, objective, precision)
        self.layer = layer
        self._fixed: tuple[nn.Module, ...] = ()

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Freeze, then as :meth:`Solo.build`. Raises ``UserError`` where no loss reads what is left to train."""
        fixed = freeze_up_to(self.student, self.layer, example.images)
        self._fixed = tuple(self.student.get_submodule(path) for path in sorted(fixed.modules))
        self.student.eval()  # until training begins: no example moves a statistic
        super().build(example, num_classes, labels)
        needs = self.objective.all_needs[0]
        with torch.enable_grad(), autocast(example.images.device, self.precision):
            output: Output = self.student(example.images, want=needs)
        if not any(tensor.requires_grad for tensor in _tensors(output)):
            raise UserError(
                f"the losses read {', '.join(needs)}, which comes before or is layer {self.layer!r} and stays as it is; choose "
                "a loss on what follows it, as --loss cross_entropy:1 with a classifier."
            )

    def train(self, mode: bool = True) -> "HeadFit":
        super().train(mode)
        for module in self._fixed:
            module.training = False
        return self


def freeze_up_to(network: Network, layer: str, images: Tensor) -> UpTo:
    """Ask for no gradient of the parameters that run up to a layer; which they are. ``UserError`` where none is left."""
    fixed = running_up_to(network, layer, images)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in fixed.parameters)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"--fit_head {layer}: nothing of the network comes after that layer; name an earlier one.")
    return fixed


def _tensors(output: Output) -> list[Tensor]:
    several = (*(output.maps or ()), *(output.preacts or ()), *(output.taps or {}).values())
    return [t for t in (*several, output.pooled, output.embedding, output.logits) if t is not None]
