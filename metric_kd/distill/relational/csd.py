"""Contextual similarity distillation: an image is as near to the teacher's gallery as it is in the teacher."""

from torch import Tensor

from metric_kd.distances import full_precision, unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def csd(
    student: Tensor,
    teacher: Tensor,
    gallery: Tensor | None = None,
    neighbours: int = 256,
    student_temperature: float = 1.0,
    teacher_temperature: float = 0.01,
) -> Tensor:
    """Divergence between how teacher and student see an image among the teacher's embeddings of its neighbours.

    With unit rows, G_i the K = ``neighbours`` rows of the gallery nearest to t_i (all of them where there are fewer),
    p_ij = softmax_j(t_i . g_j / teacher_temperature), q_ij = softmax_j(s_i . g_j / student_temperature), j in G_i:

        loss = mean_i sum_j p_ij log(p_ij / q_ij)

    The gallery is the teacher's on both sides, so that the student learns the teacher's coordinates. student, teacher:
    (N, D); gallery: (M, D) of the teacher, without one the batch's own ``teacher``, the image itself included. Half types
    are raised to float32; no gradient reaches teacher or gallery. N = 0 gives 0. Raises ``UserError`` where widths or
    lengths differ or an option is not positive.

    Wu, Wang, Zhou, Li: Contextual Similarity Distillation for Asymmetric Image Retrieval, CVPR 2022 [M]. Deviation: the
    paper's gallery is the whole training set, embedded beforehand; here it is the batch (as in D3still's code, whose
    temperatures and K are the defaults) or whatever is handed in.
    """
    _check(neighbours, student_temperature, teacher_temperature)
    gallery = teacher if gallery is None else gallery
    if len(student) != len(teacher):
        raise UserError(
            f"csd compares what both networks make of one image; got {len(student)} embeddings of the student and "
            f"{len(teacher)} of the teacher: give those of the same images."
        )
    if gallery.shape[1] != teacher.shape[1]:
        raise UserError(
            f"csd compares images with a gallery of the teacher; got embeddings of shape {tuple(teacher.shape)} and a "
            f"gallery of shape {tuple(gallery.shape)}: give one that the same teacher has embedded."
        )
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            "csd compares student and teacher in the teacher's space; got embeddings of shape "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}: give the student --embedding_size {teacher.shape[1]}."
        )
    if not len(student):
        return student.sum() * 0.0
    with full_precision(student):
        ours = unit_rows(student)
        theirs, others = (unit_rows(x.detach()).to(ours) for x in (teacher, gallery))
        near, rows = (theirs @ others.T).topk(min(neighbours, len(others)), dim=1, sorted=False)
        log_q = ((ours @ others.T).gather(1, rows) / student_temperature).log_softmax(1)
        log_p = (near / teacher_temperature).log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def _check(neighbours: int, student_temperature: float, teacher_temperature: float) -> None:
    if neighbours < 1 or not min(student_temperature, teacher_temperature) > 0:
        raise UserError(
            f"csd needs neighbours >= 1 and temperatures above 0; got {neighbours}, {student_temperature:g} and "
            f"{teacher_temperature:g}."
        )


@TERMS.register("csd")
class CSD(Term):
    """:func:`csd` on the embeddings, the batch being the gallery. Raises ``UserError`` for options that are not positive.

    Default weight 20, D3still's.
    """

    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 20.0
    anchors = True
    paper = "Contextual Similarity Distillation for Asymmetric Image Retrieval, CVPR 2022"

    def __init__(self, neighbours: int = 256, student_temperature: float = 1.0, teacher_temperature: float = 0.01):
        super().__init__()
        _check(neighbours, student_temperature, teacher_temperature)
        self.neighbours = neighbours
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        temperatures = self.student_temperature, self.teacher_temperature
        return csd(student.embedding, teacher.embedding, None, self.neighbours, *temperatures)

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        """Refuse a student of another width before the first step."""
        assert student.embedding is not None and teacher is not None and teacher.embedding is not None
        csd(student.embedding, teacher.embedding)
