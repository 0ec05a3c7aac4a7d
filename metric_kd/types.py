"""The three values that travel between the packages.

They are ``NamedTuple`` s because DDP, ``torch.compile`` and the exporters understand tuples of tensors without help.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a loader hands to a training or evaluation step.

    images: (N, 3, H, W) uint8 RGB; labels, indices: (N,) int64, ``indices`` being rows of the data set.
    views: (N,) int64, which stored view of each image, or None; teacher_images: as ``images`` where the teacher sees
    another size, else None.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    views: Tensor | None = None
    teacher_images: Tensor | None = None

    @property
    def seen_by_teacher(self) -> Tensor:
        """The images in the size that the teacher sees."""
        return self.images if self.teacher_images is None else self.teacher_images

    def to(self, device) -> "Batch":  # type: ignore[no-untyped-def]
        """The same batch on another device (asynchronously from pinned memory)."""
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]


class Output(NamedTuple):
    """What a network says about a batch; what was not wanted is None.

    maps: tuple of (N, C, H, W), after the activation: stem, stage 1 .. n; preacts: the same before the activation.
    pooled: (N, F) after global pooling; embedding: (N, D); logits: (N, K); taps: {layer's name: tensor}.
    codes: (N, a) and (N, d), summaries of the pooled feature (:mod:`metric_kd.distill.granularity`).
    """

    maps: tuple[Tensor, ...] | None = None
    preacts: tuple[Tensor, ...] | None = None
    pooled: Tensor | None = None
    embedding: Tensor | None = None
    logits: Tensor | None = None
    taps: dict[str, Tensor] | None = None
    codes: tuple[Tensor, Tensor] | None = None


class Neighbours(NamedTuple):
    """The K nearest gallery items of every query, nearest first; every metric and picture reads this.

    indices: (Q, K) int64 rows of the gallery, -1 where the gallery has fewer; distances: (Q, K) float32 Euclidean,
    inf where the index is -1; query_labels: (Q,) int64; gallery_labels: (G,) int64.
    """

    indices: Tensor
    distances: Tensor
    query_labels: Tensor
    gallery_labels: Tensor
