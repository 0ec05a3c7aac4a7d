"""Cross entropy over the training classes, with a classifier of its own where the network has none."""

from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-mean_n log softmax(logits_n)[labels_n]; logits (N, K), half types raised to float32; labels (N,) in 0 .. K-1.

    Raises ``UserError`` for labels outside that range (on the CPU, where looking at them costs no wait).
    """
    classes = logits.shape[1]
    if labels.device.type == "cpu" and labels.numel():
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            raise UserError(
                f"cross_entropy was built for {classes} classes but met labels {lowest} to {highest}; "
                f"use labels 0 to {classes - 1}."
            )
    with full_precision(logits):
        return F.cross_entropy(at_least_float32(logits), labels)


@TERMS.register("cross_entropy", "softmax")
class CrossEntropy(Term):
    """:func:`cross_entropy` of the student's logits, or of a linear classifier that the term owns and trains.

    ``features``: what the own classifier reads, "embedding" or "pooled"; "logits" insists on the network's. With
    ``scale`` None it is W x + b; with a number it is scale * cosine(w_k, x). A network that gives logits unasked is
    served by them. Raises ``UserError`` for options out of range and for logits of another number of classes.
    """

    reads_labels = True
    cost = "N D K"

    def __init__(self, features: str = "embedding", scale: float | None = None):
        super().__init__()
        if features not in ("embedding", "pooled", "logits"):
            raise one_of("features of loss 'cross_entropy':", features, ["embedding", "pooled", "logits"])
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0):
            raise UserError(f"the scale of cross_entropy multiplies cosines; got {scale!r}, give a positive number.")
        self.features, self.scale = features, scale
        self.needs = (features,)  # type: ignore[misc]  # an option chooses among what the class could declare
        self.classifier: nn.Linear | None = None

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        if num_classes < 2:
            raise UserError(f"cross_entropy needs at least two training classes; the data has {num_classes}.")
        if student.logits is not None:
            if student.logits.shape[1] != num_classes:
                raise UserError(
                    f"the network gives {student.logits.shape[1]} logits but there are {num_classes} training classes; "
                    "build the network for this data or leave its logits out."
                )
            return
        features = self._features(student)
        self.classifier = nn.Linear(features.shape[1], num_classes, bias=self.scale is None).to(features.device)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return cross_entropy(self.logits(student), batch.labels)

    def logits(self, student: Output) -> Tensor:
        """(N, K): the network's, or those of the own classifier."""
        if self.classifier is None:
            if student.logits is None:
                raise UserError("cross_entropy has no classifier; call build(student, teacher, num_classes) first.")
            return student.logits
        features = at_least_float32(self._features(student))
        if self.scale is None:
            return self.classifier(features)  # type: ignore[no-any-return]
        with full_precision(features):
            return self.scale * (unit_rows(features) @ unit_rows(self.classifier.weight).T)

    def _features(self, student: Output) -> Tensor:
        features: Tensor | None = getattr(student, self.features)
        if features is None:
            raise UserError(
                f"cross_entropy reads {self.features}, which this network does not give; choose other features."
            )
        return features
