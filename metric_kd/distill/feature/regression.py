"""Regression: every image lies where the teacher puts it, so that the student can query the teacher's gallery."""

from torch import Tensor, nn

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output

DISTANCES = ("cosine", "euclidean")
MAPS = ("auto", "identity", "linear")


def regression(student: Tensor, teacher: Tensor, distance: str = "cosine") -> Tensor:
    """Mean over images of the distance between the two embeddings of one image.

    cosine: 1 - cos(s_i, t_i), blind to lengths; rows shorter than 1e-6 count as 1 and get no gradient. euclidean:
    |s_i - t_i|^2, the squared distance.

    student, teacher: (N, D), one width; half types are raised to float32; no gradient reaches the teacher. N = 0 gives 0.
    Raises ``UserError`` for other shapes or distances.

    Budnik, Avrithis: Asymmetric metric learning for knowledge transfer, 2020, arXiv 2006.16331 ("regression"; cosine
    there).
    """
    if distance not in DISTANCES:
        raise one_of("distance of regression", distance, list(DISTANCES))
    if student.ndim != 2 or student.shape != teacher.shape:
        raise UserError(
            f"regression compares embeddings of one shape (N, D); got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "put a map between them, as --loss regression does."
        )
    if not len(student):
        return student.sum() * 0.0
    with full_precision(student):
        ours, theirs = at_least_float32(student), teacher.detach()
        theirs = theirs.to(ours)
        if distance == "euclidean":
            return (ours - theirs).square().sum(1).mean()
        return (1 - (unit_rows(ours) * unit_rows(theirs)).sum(1)).mean()


@TERMS.register("regression")
class Regression(Term):
    """:func:`regression` of the embeddings, the student's through a map.

    ``map``: identity (widths must be equal), linear (a trained matrix with bias, which belongs to the loss and is not
    part of the student: to query the teacher's gallery then takes a bridge), or auto: identity where widths are equal, else
    linear. Relational losses hold wherever the student's space lies; this one ties it to the teacher's. Raises
    ``UserError`` for other options, and for identity between different widths.

    Default weight 1, ours.
    """

    reads_teacher = True
    family = "feature"
    cost = "N D E"
    default_weight = 1.0
    paper = "Asymmetric metric learning for knowledge transfer, 2020, arXiv 2006.16331"

    def __init__(self, distance: str = "cosine", map: str = "auto"):
        super().__init__()
        if distance not in DISTANCES:
            raise one_of("distance of loss 'regression':", distance, list(DISTANCES))
        if map not in MAPS:
            raise one_of("map of loss 'regression':", map, list(MAPS))
        self.distance, self.kind = distance, map
        self.anchors = map != "linear"
        self.map: nn.Module = nn.Identity()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        ours, theirs = student.embedding.shape[1], teacher.embedding.shape[1]
        if self.kind == "linear" or (self.kind == "auto" and ours != theirs):
            self.map = nn.Linear(ours, theirs).to(student.embedding.device)
            self.anchors = False  # a trained map stays with the loss
        elif ours != theirs:
            raise UserError(
                f"regression with map=identity needs embeddings of one width; the student has {ours} and the teacher "
                f"{theirs}: give --embedding_size {theirs}, or map=linear."
            )

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        with full_precision(student.embedding):
            return regression(self.map(at_least_float32(student.embedding)), teacher.embedding, self.distance)
