"""Term: one summand of a training objective. Supervised losses and distillation methods alike are Terms."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from metric_kd.registry import Registry
from metric_kd.types import Batch, Output


class Stage(NamedTuple):
    """A stretch of training before the main one, in which one term is the whole objective.

    epochs: its length, or 0 for ``share`` of the run's epochs (rounded, at least 1). lr: factor on the run's rate.
    milestones: shares of the stage after which the rate falls to a tenth. trains_student: False where only the term's
    own parts are trained; the student is not run then. nesterov: whether SGD uses Nesterov momentum.
    """

    name: str
    share: float
    epochs: int = 0
    lr: float = 1.0
    milestones: tuple[float, ...] = ()
    trains_student: bool = True
    nesterov: bool = True


class Term(nn.Module):
    """A thin module over a pure function: it holds hyper-parameters and says what it needs.

    Constructor keywords are the term's options (``--loss name:weight,option=value``); they need defaults and
    annotations. A term with trained parts creates them in :meth:`build`, so that the trainer can put them in the
    optimiser and in the checkpoint; the exported student never contains them.
    """

    needs: ClassVar[tuple[str, ...]] = ("embedding",)
    """Fields of :class:`~metric_kd.types.Output` that the term reads from the student (and from the teacher);
    "layer:NAME" is the feature of any layer, in ``taps``."""
    teacher_needs: ClassVar[tuple[str, ...] | None] = None
    """What it reads from the teacher where that is something else."""
    reads_teacher: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    """Whether the value depends on ``batch.labels``, or on the labels of all images: then there is no training without."""
    differentiates: ClassVar[bool] = False
    """Whether the term takes gradients of what the networks gave. Both outputs then have a graph, back to
    ``batch.images`` (and ``teacher_images``), which are float32 leaves that require a gradient."""
    family: ClassVar[str] = "supervised"
    cost: ClassVar[str] = "N"
    default_weight: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""
    acts_in_main: ClassVar[bool] = True
    """False for a term that only acts in its own stages."""
    hint: ClassVar[str] = ""
    """Options that do without a field that a network cannot give, for the sentence that refuses it."""
    same_images: ClassVar[bool] = False
    """True for a term that compares the networks pixel by pixel, so that both must see the same images."""
    relates: ClassVar[bool] = False
    """Whether the value depends on how the samples of a batch lie to each other, or on what was remembered of all samples.
    Where several processes share a batch, such a term is handed all of it (outputs, labels, indices, views; no images) and
    the same random numbers on each process, so that none knows of the others; the others terms see their process's share."""
    anchors: bool = False
    """Whether the term ties the student's embedding to the teacher's coordinates, so that one can query the other."""
    one_process: ClassVar[bool] = False
    """True for a term that several processes cannot compute; most that could not otherwise can with ``relates``."""
    learning_rate: float | None = None
    """Learning rate of the term's own parameters where it differs from the run's; it falls as the run's does."""

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        """Create trained parts and refuse shapes that cannot be served (``UserError``), before any training.

        ``student`` and ``teacher`` are outputs for two example images. Called once, under a seeded generator.
        """

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        """The unweighted loss, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define forward(student, teacher, batch).")

    def stages(self) -> tuple[Stage, ...]:
        """What must be trained, in this order, before the main stage."""
        return ()

    def stage_forward(self, stage: str, student: Output | None, teacher: Output | None, batch: Batch) -> Tensor:
        """The unweighted loss in one of the term's own stages; by default that of the main stage."""
        assert student is not None
        return self.forward(student, teacher, batch)

    def enter(self, stage: str | None) -> None:
        """Called when a stage of this term begins or is resumed, and with None for every other stretch of training:
        the place to freeze what an earlier stage has trained.
        """

    def schedule(self, epoch: int, epochs: int) -> float:
        """Factor on the weight in an epoch (from 1) of the main stage; at zero the term costs nothing."""
        return 1.0


class Pair(NamedTuple):
    """Both networks and what they said of a batch: what a :class:`PairTerm` sees.

    student, teacher: ``(images, want=...) -> Output`` under the run's precision, for uint8 or float images in 0..255;
    the teacher's parameters are frozen, but its graph is kept unless the caller disables gradients. pixel_scale:
    (1, 3, 1, 1), by which the teacher multiplies a pixel value (0..255) when it normalises. labels: (M,) of all M
    training images, on the device; ``batch.indices`` are rows of it.
    """

    student: Callable[..., Output]
    teacher: Callable[..., Output]
    pixel_scale: Tensor
    labels: Tensor
    num_classes: int
    student_output: Output
    teacher_output: Output
    batch: Batch


class Seen(NamedTuple):
    """What a term sees of one step, of a process's share of the batch or of all of it; pair: for a :class:`PairTerm`."""

    student: Output | None
    teacher: Output | None
    batch: Batch
    pair: Pair | None = None


class PairTerm(Term):
    """A term that needs the networks themselves or the whole training set: extra forwards, attacks, a memory."""

    reads_teacher = True

    def build(self, pair: Pair) -> None:  # type: ignore[override]
        """As :meth:`Term.build`; the pair holds the outputs for two example images."""

    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        """The unweighted loss, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define forward(pair).")


TERMS: Registry[type[Term]] = Registry("loss")
"""Every loss and every distillation method, by the name that ``--loss`` takes."""
