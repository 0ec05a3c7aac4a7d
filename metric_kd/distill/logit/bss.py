"""BSS: the student learns the teacher's answers on images pushed across the teacher's decision boundaries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, one_hot

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Pair, PairTerm

Logits = Callable[[Tensor], Tensor]


def bss(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """Mean over images of KL(softmax(t / T) || softmax(s / T)), without the factor T^2.

    student, teacher: (N, K) logits of the attacked images; ``UserError`` where the shapes differ. Half types are raised
    to float32; no gradient reaches the teacher.

    Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, 2019 (AAAI),
    arXiv 1805.05532.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"bss compares two (N, K) tensors of logits; got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    with full_precision(student):
        student = at_least_float32(student)
        wanted = (teacher.detach().to(student) / temperature).log_softmax(1)
        return kl_div((student / temperature).log_softmax(1), wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def select(student: Tensor, teacher: Tensor, labels: Tensor, size: int) -> Tensor:
    """Rows of the images worth an attack: both networks are right; at most ``size``, those of most disagreement.

    student, teacher: (N, K) logits. Disagreement: sum over classes k != y of (p^teacher_k - p^student_k)^2. Up to
    ``size`` rows come in their own order, of more the first ``size`` by falling disagreement. One wait for the device.
    """
    right = (student.argmax(1) == labels) & (teacher.argmax(1) == labels)
    rows = right.nonzero()[:, 0]
    if len(rows) <= size:
        return rows
    gaps = at_least_float32(teacher).softmax(1) - at_least_float32(student).softmax(1)
    disagreement = gaps.square().scatter(1, labels[:, None], 0.0).sum(1)
    return rows[disagreement[rows].topk(size).indices]


@torch.no_grad()
def attack_classes(teacher: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
    """(N,) classes to push each image to: drawn by the teacher's probabilities of all classes but the label.

    teacher: (N, K) logits, K >= 2; uniform: (N,) in [0, 1); the first rank whose cumulative probability reaches
    uniform times the sum is taken.
    """
    falling = at_least_float32(teacher).softmax(1).scatter(1, labels[:, None], -1.0).sort(1, descending=True)
    reached = falling.values[:, :-1].cumsum(1)
    short = reached < uniform.to(reached)[:, None] * reached[:, -1:]
    return falling.indices.gather(1, short.sum(1, keepdim=True).clamp(max=reached.shape[1] - 1))[:, 0]


def attack(
    teacher: Logits,
    images: Tensor,
    labels: Tensor,
    classes: Tensor,
    step: float = 0.3,
    steps: int = 10,
    eps: float = 1e-4,
    low: float | Tensor = -2.5,
    high: float | Tensor = 2.5,
) -> Tensor:
    """Images moved from their label towards another class until the teacher no longer gives the label.

    x <- clamp(x + step (p_y - p_k + eps) g / |g|_2, low, high), g = d(p_k - p_y)/dx, for the images that the teacher still
    puts in class y; at most ``steps`` times. An image without a gradient stays.

    teacher: images -> (N, K) logits, each row a function of its own image; images: (N, C, H, W) in the units of
    ``step``, low and high: numbers or tensors that broadcast against them; labels, classes: (N,), y and k. Returns
    constants. Waits for the device once a step, to stop early.
    """
    images = images.detach()
    for _ in range(steps):
        with torch.enable_grad():
            leaf = images.clone().requires_grad_()
            logits = teacher(leaf)
        pull, gap = _pull(logits.detach(), labels, classes)
        wrong = logits.detach().argmax(1) != labels
        if bool(wrong.all()):
            break
        (slope,) = torch.autograd.grad(logits, leaf, pull.to(logits))
        with torch.no_grad(), full_precision(images):
            along = unit_rows(_to_one(slope.flatten(1))).view_as(slope).to(images)
            length = (step * (gap + eps)).to(images)[:, None, None, None]
            moved = torch.clamp(
                images + length * along, torch.as_tensor(low).to(images), torch.as_tensor(high).to(images)
            )
            images = torch.where(wrong[:, None, None, None], images, moved)
    return images


def _pull(logits: Tensor, labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """d(p_k - p_y)/d(logits), each row scaled to a largest entry of 1, and p_y - p_k.

    Only its direction matters, and what is sent through the network would vanish in half types for a confident teacher.
    """
    p = at_least_float32(logits).softmax(1)
    p_y, p_k = p.gather(1, labels[:, None]), p.gather(1, classes[:, None])
    towards, away = one_hot(classes, p.shape[1]).to(p), one_hot(labels, p.shape[1]).to(p)
    return _to_one(p_k * (towards - p) - p_y * (away - p)), (p_y - p_k)[:, 0]


def _to_one(rows: Tensor) -> Tensor:
    """Rows over their largest absolute entry; zero rows stay."""
    largest = at_least_float32(rows).abs().amax(1, keepdim=True)
    return rows / largest.masked_fill(largest == 0, 1.0)


@contextmanager
def resting_statistics(network: nn.Module) -> Iterator[None]:
    """Batch normalisation in training mode leaves its running statistics alone; it normalises as ever."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@TERMS.register("bss")
class BSS(PairTerm):
    """:func:`bss` on at most ``attack_size`` images of the batch, attacked by :func:`attack` on the teacher.

    :func:`select` chooses the images, :func:`attack_classes` the classes. ``step`` is in the teacher's normalised units;
    images stay within the valid pixels 0..255. ``batch_norm`` ``keep``: attacked images are normalised by their own
    statistics and leave the student's running ones alone, ``update``: they change them. A batch without a candidate gives
    0. The weight (default: the KD Zoo's) is 0 in the first 5 % of the epochs, then falls in a line from the full one,
    which it would have in epoch 1, to 0 at 80 %.

    Deviations from the KD Zoo: it clamps to +-2.5 in normalised units, which is no valid image, and lets attacked images
    into the running statistics. The paper adds the usual KL on the clean images: give ``st`` as well. Raises ``UserError``
    for options out of range, and where the networks see images of two sizes or tell other classes apart.

    Default weight 2, the KD Zoo's.
    """

    needs = ("logits",)
    reads_labels = True
    family = "logit"
    cost = "N K + attacks"
    default_weight = 2.0
    paper = "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, 2019, arXiv 1805.05532"

    def __init__(
        self,
        temperature: float = 3.0,
        attack_size: int = 32,
        step: float = 0.3,
        steps: int = 10,
        eps: float = 1e-4,
        batch_norm: str = "keep",
    ):
        super().__init__()
        if not temperature > 0 or attack_size < 1 or not step > 0 or steps < 1 or not eps >= 0:
            raise UserError(
                "bss needs temperature > 0, attack_size of 1 or more, step > 0, steps of 1 or more and eps >= 0; "
                f"got {temperature:g}, {attack_size}, {step:g}, {steps} and {eps:g}."
            )
        if batch_norm not in ("keep", "update"):
            raise one_of("batch_norm of loss 'bss':", batch_norm, ["keep", "update"])
        self.temperature, self.attack_size, self.step = temperature, attack_size, step
        self.steps, self.eps, self.batch_norm = steps, eps, batch_norm

    def schedule(self, epoch: int, epochs: int) -> float:
        return 0.0 if 20 * epoch <= epochs else max(1 - 1.25 * (epoch - 1) / epochs, 0.0)

    def build(self, pair: Pair) -> None:  # type: ignore[override]
        _check_images(pair)
        student, teacher = pair.student_output.logits, pair.teacher_output.logits
        assert student is not None and teacher is not None
        if student.shape != teacher.shape or student.shape[1] < 2:
            raise UserError(
                "bss needs a student and a teacher that tell the same two classes or more apart; got "
                f"{student.shape[1]} and {teacher.shape[1]} logits."
            )
        if self.batch_norm == "keep" and not isinstance(_module(pair), nn.Module):
            raise UserError("bss cannot find the student's batch normalisation; give a module, or batch_norm=update.")

    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        _check_images(pair)
        ours, theirs, labels = pair.student_output.logits, pair.teacher_output.logits, pair.batch.labels
        assert ours is not None and theirs is not None
        rows = select(ours.detach(), theirs, labels, self.attack_size)
        if not len(rows):
            return at_least_float32(ours).sum() * 0.0
        if len(rows) == 1:  # batch normalisation of maps of 1x1 refuses one image; two copies have the same statistics
            rows = rows.expand(2)
        classes = attack_classes(theirs[rows], labels[rows], torch.rand(len(rows), device=rows.device))
        pixels = self._attacked(pair, rows, classes)
        with torch.no_grad():
            teacher = _logits(pair.teacher, pixels)
        if self.batch_norm == "update":
            return bss(_logits(pair.student, pixels), teacher, self.temperature)
        with resting_statistics(_module(pair)):
            return bss(_logits(pair.student, pixels), teacher, self.temperature)

    def _attacked(self, pair: Pair, rows: Tensor, classes: Tensor) -> Tensor:
        """Float images in 0..255. Their normalised units here are pixels times scale: a shift changes no gradient."""
        scale = pair.pixel_scale.float()
        images = attack(
            lambda x: _logits(pair.teacher, x / scale),
            pair.batch.images[rows].detach().float() * scale,
            pair.batch.labels[rows],
            classes,
            self.step,
            self.steps,
            self.eps,
            low=0.0,
            high=255 * scale,
        )
        return images / scale


def _logits(network: Callable[..., object], images: Tensor) -> Tensor:
    logits = getattr(network(images, want=("logits",)), "logits", None)
    assert isinstance(logits, Tensor)
    return logits


def _module(pair: Pair) -> nn.Module:
    """The student as a module, also where the pair holds it under the run's precision."""
    return getattr(pair.student, "network", pair.student)  # type: ignore[arg-type]


def _check_images(pair: Pair) -> None:
    if pair.batch.teacher_images is not None:
        raise UserError(
            "bss shows the student the images that it attacked for the teacher, so both must see one size; give them the "
            "same input size or leave bss out."
        )
