"""CRD: student and teacher agree on an image where images of other classes, remembered from earlier steps, stand beside it."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.errors import UserError, one_of
from metric_kd.losses.term import TERMS, Pair, PairTerm

AT_ONCE = 2**22
"""Anchors times rows of a memory bank that are held at once: 16 MiB of float32."""

UNSET = -math.inf
"""The logarithm of a partition sum that no batch has estimated yet."""


def crd(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    rows: Tensor,
    temperature: float = 0.1,
    eps: float = 1e-7,
    log_z: Tensor | None = None,
) -> Tensor:
    """Noise-contrastive loss of both networks' embeddings, each against the memory of the other's.

    For anchors v, memory M of m rows and ``rows`` (N, 1 + K), of which column 0 is the positive:
    x_nk = exp(M[rows_nk] . v_n / temperature) / Z, q = K / m,
    c = -(1/N) sum_n [log x_n0 / (x_n0 + q + eps) + sum_{k>=1} log q / (x_nk + q + eps)];
    loss = c(student, teacher_memory) + c(teacher, student_memory).

    student, teacher: (N, d), unit rows; memories (m, d), constant. log_z: (2,), log Z of the student's and of the
    teacher's anchors; where it is -inf, or not given, Z = m mean(exp(.)) of this call, as a constant. Half types are
    raised to float32. The gradient also reaches ``teacher``: it is what a trained layer makes of the teacher's feature,
    and the caller detaches that feature. Raises ``UserError`` for tensors that do not fit.

    Tian, Krishnan, Isola: Contrastive Representation Distillation, 2020, arXiv 1910.10699. The scores against the whole
    memory are one matrix product, from which the wanted ones are picked; M[rows], N (1 + K) d numbers, is never made.
    """
    return _crd(student, teacher, student_memory, teacher_memory, rows, temperature, eps, log_z)[0]


def _crd(
    student: Tensor,
    teacher: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    rows: Tensor,
    temperature: float,
    eps: float,
    log_z: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and log Z of both as it was used."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not len(rows) == len(student) == len(teacher):
        raise UserError(
            "crd needs one positive and one or more negatives for each image, rows (N, 1 + K); got "
            f"{tuple(rows.shape)} for embeddings {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if not (student.shape[1:] == teacher.shape[1:] == student_memory.shape[1:] == teacher_memory.shape[1:]):
        raise UserError(
            "crd compares embeddings and memories of one width; got "
            f"{[tuple(x.shape) for x in (student, teacher, student_memory, teacher_memory)]}."
        )
    with full_precision(student):
        known = student.new_full((2,), UNSET) if log_z is None else log_z
        ours, our_z = _contrast(student, teacher_memory, rows, known[0], temperature, eps)
        theirs, their_z = _contrast(teacher, student_memory, rows, known[1], temperature, eps)
        return ours + theirs, torch.stack([our_z, their_z])


def _contrast(
    anchors: Tensor, memory: Tensor, rows: Tensor, log_z: Tensor, temperature: float, eps: float
) -> tuple[Tensor, Tensor]:
    anchors = at_least_float32(anchors)
    value, log_z = _Contrast.apply(  # type: ignore[no-untyped-call]
        anchors, memory.detach().to(anchors), rows, log_z.detach().to(anchors), temperature, eps
    )
    return value, log_z


class _Contrast(torch.autograd.Function):
    """c of :func:`crd` and log Z. The gradient is taken at once: afterwards the caller may overwrite the memory."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, memory: Tensor, rows: Tensor, log_z: Tensor, temperature: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        negatives = rows.shape[1] - 1
        noise = negatives / len(memory)
        scores = _scores(anchors, memory, rows).div_(temperature)
        estimate = scores.flatten().logsumexp(0) + math.log(len(memory) / scores.numel())
        log_z = torch.where(log_z == UNSET, estimate, log_z)
        # log x - log(q + eps): both fractions of the loss are sigmoids of it, safe at any size of a score.
        odds = scores.sub_(log_z + math.log(noise + eps))
        missed = logsigmoid(odds[:, 0]).sum() + logsigmoid(-odds[:, 1:]).sum()
        value = negatives * math.log1p(eps / noise) - missed / len(rows)
        if ctx.needs_input_grad[0]:
            slope = odds.sigmoid_()
            slope[:, 0] -= 1
            ctx.save_for_backward(_weighted_rows(slope.div_(len(rows) * temperature), memory, rows))
        ctx.mark_non_differentiable(log_z)
        return value, log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None, None, None, None


def _scores(anchors: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """(N, 1 + K) of anchors_n . memory[rows_nk]."""
    size = _share(memory)
    parts = zip(anchors.split(size), rows.split(size), strict=True)
    return torch.cat([(anchor @ memory.T).gather(1, row) for anchor, row in parts])


def _weighted_rows(weights: Tensor, memory: Tensor, rows: Tensor) -> Tensor:
    """(N, d) of sum_k weights_nk memory[rows_nk]."""
    size = _share(memory)
    parts = zip(weights.split(size), rows.split(size), strict=True)
    return torch.cat([memory.new_zeros(len(r), len(memory)).scatter_add_(1, r, w) @ memory for w, r in parts])


def _share(memory: Tensor) -> int:
    return max(1, AT_ONCE // len(memory))


class Contrasts(nn.Module):
    """Draws for every anchor one positive and ``negatives`` rows of images of other classes.

    labels: (M,) of all images. The positive is the image itself, or with ``relax`` any image of its class. Negatives
    are uniform, without replacement, and with replacement for a class outside of which there are fewer images. Draws
    come from torch's global generator on the device of ``labels``. Raises ``UserError`` where all images have one class.
    """

    classes: Tensor
    order: Tensor
    start: Tensor
    count: Tensor

    def __init__(self, labels: Tensor, negatives: int, relax: bool = False):
        super().__init__()
        _, classes, count = labels.unique(return_inverse=True, return_counts=True)
        if len(count) < 2:
            raise UserError("crd contrasts images of different classes; give training images of two classes or more.")
        self.negatives, self.relax = negatives, relax
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("order", classes.argsort(stable=True), persistent=False)  # rows, class by class
        self.register_buffer("start", count.cumsum(0) - count, persistent=False)
        self.register_buffer("count", count, persistent=False)
        self.scarce = negatives > len(labels) - int(count.max())
        self.plenty = negatives <= len(labels) - int(count.min())

    def forward(self, indices: Tensor) -> Tensor:
        """(N,) rows to (N, 1 + negatives) rows, the positive first."""
        return torch.cat([self._positives(indices)[:, None], self._negatives(indices)], dim=1)

    def _positives(self, indices: Tensor) -> Tensor:
        if not self.relax:
            return indices
        own = self.classes[indices]
        return self.order[self.start[own] + _below(self.count[own])]

    def _negatives(self, indices: Tensor) -> Tensor:
        parts = [self.classes[part] for part in indices.split(_share(self.classes))]
        if not self.plenty:
            return torch.cat([self._repeating(own) for own in parts])
        if not self.scarce:
            return torch.cat([self._distinct(own) for own in parts])
        enough = (len(self.classes) - self.count >= self.negatives)[self.classes[indices], None]
        return torch.where(
            enough,
            torch.cat([self._distinct(own) for own in parts]),
            torch.cat([self._repeating(own) for own in parts]),
        )

    def _distinct(self, own: Tensor) -> Tensor:
        """The images with the largest of independent random keys: a uniform set, in some order."""
        keys = torch.rand(len(own), len(self.classes), device=own.device)
        keys.masked_fill_(own[:, None] == self.classes, -1.0)
        return keys.topk(self.negatives, dim=1, sorted=False).indices

    def _repeating(self, own: Tensor) -> Tensor:
        pool = (len(self.classes) - self.count[own])[:, None].expand(-1, self.negatives)
        place = _below(pool)
        beyond = place >= self.start[own, None]  # in ``order`` an anchor's class is one range: step over it
        return self.order[place + beyond * self.count[own, None]]


def _below(limits: Tensor) -> Tensor:
    """Uniform integers of 0 to limit - 1 (limits below 2^32), all of one call's draws, without a division."""
    return (torch.randint(2**31, limits.shape, device=limits.device) * limits) >> 31


def last_places(indices: Tensor) -> Tensor:
    """(N,) where in the batch each entry of ``indices`` stands for the last time."""
    places = torch.arange(len(indices), device=indices.device)
    return torch.where(indices[:, None] == indices, places, -1).amax(1)


@TERMS.register("crd")
class CRD(PairTerm):
    """:func:`crd` of the embeddings behind one trained linear layer each, with a memory of the whole training set.

    Both layers lead to ``dim`` unit coordinates. The memories start uniform in +-sqrt(3 / dim); after every training
    batch M[i] <- l2(momentum M[i] + (1 - momentum) v_i), of an image that the batch holds twice with its last place
    there. Z is estimated from the first training batch and frozen. ``negatives`` per image from other classes,
    ``mode`` ``exact``: the positive is the image itself, ``relax``: any image of its class. Memories and log Z are in the
    checkpoint. Default weight 0.8: the KD Zoo's for CIFAR-100. Raises ``UserError`` for options out of range.

    Where processes share a batch, every one of them remembers all of it, in the same order, so that their memories agree.

    Deviation: rows are not drawn by the data set but by the term, on its device.
    """

    needs = ("embedding",)
    reads_labels = True
    family = "relational"
    cost = "N M D"
    default_weight = 0.8
    paper = "Contrastive Representation Distillation, 2020, arXiv 1910.10699"
    relates = True

    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor

    def __init__(
        self,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.1,
        momentum: float = 0.5,
        mode: str = "exact",
        eps: float = 1e-7,
    ):
        super().__init__()
        if dim < 1 or negatives < 1 or not temperature > 0 or not 0 <= momentum < 1 or not eps >= 0:
            raise UserError(
                "crd needs dim and negatives of 1 or more, temperature > 0, momentum from 0 to below 1 and eps >= 0; "
                f"got {dim}, {negatives}, {temperature:g}, {momentum:g} and {eps:g}."
            )
        if mode not in ("exact", "relax"):
            raise one_of("mode of loss 'crd':", mode, ["exact", "relax"])
        self.dim, self.negatives, self.temperature = dim, negatives, temperature
        self.momentum, self.mode, self.eps = momentum, mode, eps
        self.student_layer: nn.Module = nn.Identity()
        self.teacher_layer: nn.Module = nn.Identity()
        self.contrasts: nn.Module = nn.Identity()

    def build(self, pair: Pair) -> None:  # type: ignore[override]
        student, teacher = pair.student_output.embedding, pair.teacher_output.embedding
        assert student is not None and teacher is not None
        device = student.device
        self.contrasts = Contrasts(pair.labels, self.negatives, relax=self.mode == "relax").to(device)
        self.student_layer = nn.Linear(student.shape[1], self.dim).to(device)
        self.teacher_layer = nn.Linear(teacher.shape[1], self.dim).to(device)
        bound = math.sqrt(3 / self.dim)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(len(pair.labels), self.dim).uniform_(-bound, bound).to(device))
        self.register_buffer("log_z", torch.full((2,), UNSET, device=device))

    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        ours, theirs = pair.student_output.embedding, pair.teacher_output.embedding
        assert ours is not None and theirs is not None
        indices = pair.batch.indices
        with full_precision(ours):
            student = unit_rows(self.student_layer(ours.to(self.student_memory.dtype)))
            teacher = unit_rows(self.teacher_layer(theirs.detach().to(self.teacher_memory.dtype)))
            loss, log_z = _crd(
                student,
                teacher,
                self.student_memory,
                self.teacher_memory,
                self.contrasts(indices),
                self.temperature,
                self.eps,
                self.log_z,
            )
            if self.training:
                self.log_z.copy_(log_z)
                self._remember(indices, student.detach(), teacher.detach())
        return loss

    @torch.no_grad()
    def _remember(self, indices: Tensor, student: Tensor, teacher: Tensor) -> None:
        last = last_places(indices)  # copies of an image write the same values, so that their order does not matter
        for memory, new in ((self.student_memory, student), (self.teacher_memory, teacher)):
            memory[indices] = unit_rows(self.momentum * memory[indices] + (1 - self.momentum) * new[last])
