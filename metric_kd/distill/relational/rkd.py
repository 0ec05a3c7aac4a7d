"""Relational knowledge distillation: both of its losses, on distances and on angles, as one method."""

from torch import Tensor

from metric_kd.distances import paired
from metric_kd.distill.relational.rkd_angle import rkd_angle
from metric_kd.distill.relational.rkd_distance import rkd_distance
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


@TERMS.register("rkd")
class RKD(Term):
    """distance * :func:`rkd_distance` + angle * :func:`rkd_angle` of the embeddings, whose distances they share.

    The factors are the KD Zoo's; one of zero costs nothing. Raises ``UserError`` for a negative factor, and where both
    are zero.

    Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019, arXiv 1904.05068. Deviation: the inner weights are the KD Zoo's,
    where the paper has 1 and 2 for embeddings of length 1.

    Default weight 1, the KD Zoo's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D + N^3"
    default_weight = 1.0
    paper = "Relational Knowledge Distillation, 2019, arXiv 1904.05068"

    def __init__(self, distance: float = 25.0, angle: float = 50.0):
        super().__init__()
        if not (distance >= 0 and angle >= 0 and distance + angle > 0):
            raise UserError(f"rkd needs factors of 0 or more, not both 0; got distance={distance:g}, angle={angle:g}.")
        self.distance, self.angle = distance, angle

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        rows = paired(student.embedding, teacher.embedding)
        if not self.angle:
            return self.distance * rkd_distance(*rows)
        if not self.distance:
            return self.angle * rkd_angle(*rows)
        return self.distance * rkd_distance(*rows) + self.angle * rkd_angle(*rows)
