"""Flow of solution procedure: how the student's features change from stage to stage is as the teacher's."""

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import connector
from metric_kd.distill.layers import MapPair, paired_maps, parse_layers, pool_to_smaller
from metric_kd.distill.stages import initialising_stage
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Stage, Term
from metric_kd.types import Batch, Output


def fsp(student_pair: MapPair, teacher_pair: MapPair) -> Tensor:
    """Mean squared gap between the Gram matrices of two layers, over N, C1 and C2.

    G(F1, F2) = F1 F2^T / P over the P positions of one grid; loss = mean over N C1 C2 of (G^(student) - G^(teacher))^2.

    Each pair: maps (N, C1, H, W) and (N, C2, H', W') of two layers of one network; of the two the larger grid is
    averaged down to the smaller one. Student and teacher may have different grids, but the same C1 and C2; else
    ``UserError``. Half types are raised to float32; no gradient reaches the teacher.

    Yim, Joo, Bae, Kim: A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning, 2017, doi 10.1109/CVPR.2017.754. Deviation: a mean over the matrix where the paper sums; average
    pooling where grids differ (both as in the usual code).
    """
    with full_precision(student_pair[0]):
        ours = _gram(*student_pair)
        theirs = _gram(*(maps.detach() for maps in teacher_pair))
        if ours.shape != theirs.shape:
            raise UserError(
                f"fsp compares matrices of one shape; got {tuple(ours.shape)} and {tuple(theirs.shape)}: "
                "give both pairs the same batch and channels, as --loss fsp does with its connectors."
            )
        return mse_loss(ours, theirs.to(ours))


def _gram(first: Tensor, second: Tensor) -> Tensor:
    first, second = pool_to_smaller(at_least_float32(first), at_least_float32(second))
    rows, columns = first.flatten(2), second.flatten(2)
    return rows @ (columns / rows.shape[2]).mT


@TERMS.register("fsp")
class FSP(Term):
    """Mean of :func:`fsp` over consecutive stages, in a stage of its own before the student learns the task.

    Stem to stage 1, 1 to 2, 2 to 3 (of a network with more stages the last four maps); ``layers=0/2/3`` names others.
    A student's map whose width is not the teacher's goes through a trained 1x1 convolution with batch normalisation;
    both pairs of a map share it. ``stage_epochs``: length of the own stage, 0 for a quarter of the run; ``in_main``:
    no own stage, the term stays on beside the others. Default weight 1: the KD Zoo's. Raises ``UserError`` for fewer
    than two layers.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"
    cost = "N C^2 H W"
    default_weight = 1.0
    paper = "A Gift from Knowledge Distillation, 2017, doi 10.1109/CVPR.2017.754"
    acts_in_main = False

    def __init__(self, layers: str = "", stage_epochs: int = 0, in_main: bool = False):
        super().__init__()
        self.layers = parse_layers(layers)
        self.stage = initialising_stage("fsp", stage_epochs)
        self.acts_in_main = in_main  # type: ignore[misc]  # an option widens what the class declares
        self.connectors = nn.ModuleList()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        pairs = paired_maps(student, teacher, self.layers, count=4)
        if len(pairs) < 2:
            raise UserError("fsp compares one stage with the next; give two layers or more, as in layers=0/1/2/3.")
        self.connectors = nn.ModuleList(connector(s, t) for s, t in pairs)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        pairs = paired_maps(student, teacher, self.layers, count=4)
        ours = [layer(at_least_float32(s)) for layer, (s, _) in zip(self.connectors, pairs, strict=True)]
        theirs = [t for _, t in pairs]
        steps = range(len(pairs) - 1)
        return torch.stack([fsp((ours[i], ours[i + 1]), (theirs[i], theirs[i + 1])) for i in steps]).mean()

    def stages(self) -> tuple[Stage, ...]:
        return () if self.acts_in_main else (self.stage,)
