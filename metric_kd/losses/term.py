"""Term: one summand of a training objective. Supervised losses and distillation methods alike are Terms."""

from typing import ClassVar

from torch import Tensor, nn

from metric_kd.registry import Registry
from metric_kd.types import Batch, Output


class Term(nn.Module):
    """A thin module over a pure function: it holds hyper-parameters and says what it needs.

    Constructor keywords are the term's options (``--loss name:weight,option=value``); they need defaults and
    annotations. A term with trained parts creates them in :meth:`build`, so that the trainer can put them in the
    optimiser and in the checkpoint; the exported student never contains them.
    """

    needs: ClassVar[tuple[str, ...]] = ("embedding",)
    """Fields of :class:`~metric_kd.types.Output` that the term reads from the student (and from the teacher)."""
    reads_teacher: ClassVar[bool] = False
    family: ClassVar[str] = "supervised"
    cost: ClassVar[str] = "N"
    default_weight: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        """Create trained parts and refuse shapes that cannot be served (``UserError``), before any training.

        ``student`` and ``teacher`` are outputs for two example images. Called once, under a seeded generator.
        """

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        """The unweighted loss, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define forward(student, teacher, batch).")


TERMS: Registry[type[Term]] = Registry("loss")
"""Every loss and every distillation method, by the name that ``--loss`` takes."""
