"""Activation boundaries: the student's neurons are on where the teacher's are, and off where they are off."""

from torch import Tensor

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.connectors import LayerwiseTerm
from metric_kd.distill.layers import same_shape
from metric_kd.distill.stages import initialising_stage
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Stage


def ab(student: Tensor, teacher: Tensor, margin: float = 2.0) -> Tensor:
    """Mean squared hinge that puts the student's pre-activations on the teacher's side of zero.

    loss = mean over N C H W of max(margin - s, 0)^2 where t > 0, and of max(margin + s, 0)^2 elsewhere.

    student, teacher: (N, C, H, W) before the activation, one shape (else ``UserError``). Half types are raised to
    float32; no gradient reaches the teacher.

    Heo, Lee, Yun, Choi: Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, 2019,
    arXiv 1811.03233. Deviation: a mean where the paper sums over the neurons (as in the KD Zoo).
    """
    same_shape("ab", student, teacher)
    with full_precision(student):
        student = at_least_float32(student)
        side = (teacher.detach() > 0).to(student).mul_(2).sub_(1)
        return (margin - side * student).clamp(min=0).square().mean()


@TERMS.register("ab")
class AB(LayerwiseTerm):
    """Mean of :func:`ab` over stages, in a stage of its own before the student learns the task.

    ``layers`` as in ``1/2/3``, the last three by default; the larger grid is averaged down to the smaller one, and a
    student whose width is not the teacher's goes through a trained 1x1 convolution with batch normalisation.
    ``stage_epochs``: length of the own stage, 0 for a quarter of the run; ``in_main``: no own stage, the term stays on
    beside the others. Default weight 10 and margin 2: the KD Zoo's. Raises ``UserError`` for a margin below 0.
    """

    needs = ("preacts",)
    cost = "N C H W"
    default_weight = 10.0
    paper = "Knowledge Transfer via Distillation of Activation Boundaries, 2019, arXiv 1811.03233"
    acts_in_main = False

    def __init__(self, margin: float = 2.0, layers: str = "", stage_epochs: int = 0, in_main: bool = False):
        super().__init__(layers)
        if not margin >= 0:
            raise UserError(f"ab needs a margin of 0 or more; got {margin:g}.")
        self.margin = margin
        self.stage = initialising_stage("ab", stage_epochs)
        self.acts_in_main = in_main  # type: ignore[misc]  # an option widens what the class declares

    def compare(self, level: int, student: Tensor, teacher: Tensor) -> Tensor:
        return ab(student, teacher, self.margin)

    def stages(self) -> tuple[Stage, ...]:
        return () if self.acts_in_main else (self.stage,)
