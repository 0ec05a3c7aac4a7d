"""FitNet hints: the student's features, linearly transformed, equal the teacher's."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import regressor
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers, pool_to_smaller
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of (student - teacher)^2.

    Two tensors of one shape; half types are raised to float32; no gradient reaches the teacher. Raises ``UserError``
    where the shapes differ: the trained transform that makes them equal belongs to :class:`FitNet`.

    Romero et al.: FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550. Deviation: a mean where the paper has half
    the squared norm (as in the usual code).
    """
    if student.shape != teacher.shape:
        raise UserError(
            f"fitnet compares tensors of one shape; got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "put a trained transform between them, as --loss fitnet does."
        )
    with full_precision(student):
        student = at_least_float32(student)
        return mse_loss(student, teacher.detach().to(student))


def _linear(student: Tensor, teacher: Tensor) -> nn.Module:
    width, wanted = student.shape[1], teacher.shape[1]
    layer: nn.Conv2d | nn.Linear
    if student.ndim == 4:
        layer = nn.Conv2d(width, wanted, 1, bias=False)
    else:
        layer = nn.Linear(width, wanted, bias=False)
    nn.init.uniform_(layer.weight, -0.005, 0.005)
    return layer.to(student.device)


def _regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    return regressor(student, teacher) if student.ndim == 4 else _linear(student, teacher)


def _none(student: Tensor, teacher: Tensor) -> nn.Module:
    if student.shape != teacher.shape:
        ours, theirs = ("x".join(map(str, x.shape[1:])) for x in (student, teacher))
        raise UserError(
            f"fitnet with connector=none needs equal shapes; the student has {ours} where the teacher has {theirs}: "
            "choose connector=linear, or other layers."
        )
    return nn.Identity()


CONNECTORS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "linear": _linear,
    "regressor": _regressor,
    "none": _none,
}


@TERMS.register("fitnet")
class FitNet(Term):
    """Sum of :func:`fitnet` over stages and the embedding, each after its own trained connector.

    ``layers`` as in ``2/3/4``, the last three stages by default; ``embedding`` adds the embedding. ``connector``:

    - linear: stages go through a 1x1 convolution, the embedding through a matrix, without bias, drawn from
      U(-0.005, 0.005); the larger grid of a stage is averaged down to the smaller one. As in the RKD code, but there
      the maps were never trained: they had been left out of the optimiser.
    - regressor: stages go through :func:`~metric_kd.distill.connectors.regressor`, RepDistiller's, to the teacher's
      grid; the embedding as with linear.
    - none: nothing is trained, and shapes must be equal (``UserError``). The KD Zoo's form is
      ``fitnet:0.1,layers=3,embedding=false,connector=none``: weight 0.1, the last stage of a CIFAR network.

    Default weight 1, that of the RKD code for this sum; the KD Zoo has 0.1 on the last stage alone.
    """

    needs: ClassVar[tuple[str, ...]] = ("maps", "embedding")
    reads_teacher = True
    family = "feature"
    cost = "N C C' H W"
    default_weight = 1.0
    paper = "FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550"

    def __init__(self, layers: str = "", embedding: bool = True, connector: str = "linear"):
        super().__init__()
        if connector not in CONNECTORS:
            raise one_of("connector of loss 'fitnet':", connector, list(CONNECTORS))
        self.layers, self.embedding, self.connector = parse_layers(layers), embedding, connector
        if not embedding:
            self.needs = ("maps",)  # type: ignore[misc]  # an option narrows what the class declares
        self.anchors = embedding and connector == "none"
        self.connectors = nn.ModuleList()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        connect = CONNECTORS[self.connector]
        self.connectors = nn.ModuleList(connect(ours, theirs) for ours, theirs in self._pairs(student, teacher))

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        pairs = zip(self.connectors, self._pairs(student, teacher), strict=True)
        return torch.stack([fitnet(connector(at_least_float32(s)), t) for connector, (s, t) in pairs]).sum()

    def _pairs(self, student: Output, teacher: Output | None) -> list[MapPair]:
        pairs = paired_maps(student, teacher, self.layers)
        if self.connector == "linear":
            pairs = [pool_to_smaller(*pair) for pair in pairs]
        if self.embedding:
            if student.embedding is None or teacher is None or teacher.embedding is None:
                raise UserError("fitnet found no embedding to compare; switch that part off with embedding=false.")
            pairs.append((student.embedding, teacher.embedding))
        return pairs
