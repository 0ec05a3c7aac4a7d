"""Pairwise: all distances within one batch of embeddings, computed once, safe in value and in gradient."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Union

import torch
from torch import Tensor

from metric_kd.errors import UserError

COINCIDENT = 1e-12
"""The squared distance that two different rows have at least; rows at or below it count as one point."""

LARGE, STRIP, NEAR, MOST_NEAR = 512, 256, 0.5, 16
"""From ``LARGE`` rows on a CPU multiplies float32 rows in float32, ``STRIP`` rows at a time. Pairs whose squared distance
is below ``NEAR`` of the first row's squared length are corrected, unless there are more than ``MOST_NEAR`` a row."""

OFFSET = 1e-6
"""What ``torch.nn.functional.pairwise_distance`` adds to every coordinate difference."""


def at_least_float32(x: Tensor) -> Tensor:
    """Half types raised to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def unit_rows(x: Tensor, shortest: float = 1e-6) -> Tensor:
    """x_i / |x_i| in at least float32; rows shorter than ``shortest`` become zero and get no gradient.

    x: (N, D). A plain normalisation would send them a gradient of up to 1e12.
    """
    x = at_least_float32(x)
    short = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) < shortest
    safe = x.masked_fill(short, 1.0)
    return (safe / torch.linalg.vector_norm(safe, dim=1, keepdim=True)).masked_fill(short, 0.0)


class _Squared(torch.autograd.Function):
    """(N, D) rows to their (N, N) squared distances, which :func:`_found` has computed; a product of that size backward.

    symmetric: the gradient that comes back is a symmetric matrix with a diagonal of zeros; then it is taken as it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, symmetric: bool, squared: Tensor, *near: Tensor) -> Tensor:
        ctx.save_for_backward(x, squared, *near)
        ctx.symmetric = symmetric
        return squared.view_as(squared)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, squared, *near = ctx.saved_tensors
        pulls = _pulls_in_single_precision if near else _pulls_in_double_precision
        with full_precision(x):
            return pulls(x, squared, grads[0], ctx.symmetric, *near), None, None, *(None for _ in near)


def _found(x: Tensor) -> tuple[Tensor, ...]:
    """Squared distances and, where they were taken in single precision, the pairs that were corrected."""
    return (_in_single_precision(x) if _single_precision_serves(x) else None) or (_in_double_precision(x),)


def _in_double_precision(x: Tensor) -> Tensor:
    rows = _centred(x.double())
    gram = rows @ rows.T
    lengths = gram.diagonal().clone()
    both = lengths[:, None] + lengths[None, :]
    squared = gram.mul_(-2).add_(both)
    # What the Gram form cannot tell from zero: a few roundings of the two lengths. NaN compares false and stays.
    squared.masked_fill_(squared <= both.mul_(8 * torch.finfo(torch.float64).eps).clamp_(min=COINCIDENT), COINCIDENT)
    return squared.fill_diagonal_(0.0).to(x.dtype)


def _in_single_precision(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(squared distances, first, second): a product in float32, and direct differences for the pairs (first, second)
    that are so near that it would lose digits; None where these are too many to pay.
    """
    rows, n = _centred(x), len(x)
    lengths = torch.linalg.vector_norm(rows, dim=1).square_()
    if (lengths <= COINCIDENT / NEAR).any():
        return None  # below, only pairs that are near can coincide
    squared, found = x.new_empty(n, n), []
    for start in range(0, n, STRIP):  # the upper triangle; the lower one is its mirror
        stop = min(start + STRIP, n)
        strip = squared[start:stop, start:]
        torch.addmm(lengths[start:], rows[start:stop], rows[start:].T, alpha=-2, out=strip).add_(
            lengths[start:stop, None]
        )
        corner = strip[:, : stop - start]
        corner.copy_(corner.triu() + corner.triu(1).T)
        squared[stop:, start:stop] = strip[:, stop - start :].T
        near = (strip <= NEAR * lengths[start:stop, None]).nonzero() + start
        found.append(near[near[:, 0] < near[:, 1]])
    first, second = torch.cat(found).unbind(1)
    if len(first) > MOST_NEAR * n:
        return None
    parts = zip(first.split(STRIP), second.split(STRIP), strict=True)
    exact = torch.cat([(x[i] - x[j]).square().sum(1) for i, j in parts]).clamp_(min=COINCIDENT)
    squared[first, second] = exact
    squared[second, first] = exact
    return squared.fill_diagonal_(0.0), first, second


def _pulls_in_double_precision(x: Tensor, squared: Tensor, grad: Tensor, symmetric: bool) -> Tensor:
    """2 sum_j (g_ij + g_ji) (x_i - x_j), the diagonal and coincident rows left out."""
    weight = grad.masked_fill(squared <= COINCIDENT, 0.0).double()
    # Adding the transpose as a view takes several times as long.
    weight = 2 * weight if symmetric else weight + weight.T.contiguous()
    rows = _centred(x.double())
    return (2 * (weight.sum(1, keepdim=True) * rows - weight @ rows)).to(x.dtype)


def _pulls_in_single_precision(
    x: Tensor, squared: Tensor, grad: Tensor, symmetric: bool, first: Tensor, second: Tensor
) -> Tensor:
    """The same after :func:`_in_single_precision`: what it corrected is again taken from direct differences."""
    if symmetric:
        factor, weight = 4, grad.clone() if len(first) else grad
    else:
        factor, weight = 2, grad.T.clone(memory_format=torch.contiguous_format).add_(grad).fill_diagonal_(0.0)
    near = weight[first, second].masked_fill(squared[first, second] <= COINCIDENT, 0.0)
    if len(first):
        weight[first, second] = 0.0
        weight[second, first] = 0.0
    rows = _centred(x)
    far = torch.addmm(rows * (factor * weight.sum(1, keepdim=True)), weight, rows, alpha=-factor)
    pulls = factor * near[:, None] * (x[first] - x[second])
    return far.index_add_(0, first, pulls).index_add_(0, second, pulls, alpha=-1)


def _single_precision_serves(x: Tensor) -> bool:
    """Whether float32 products are worth their care: many rows, on a CPU, whose matrix products are not lowered."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and len(x) >= LARGE and not _products_are_lowered()


def _products_are_lowered() -> bool:
    onednn = getattr(torch.backends.mkldnn, "matmul", None)
    if onednn is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    return onednn.fp32_precision not in ("none", "ieee")


def _centred(x: Tensor) -> Tensor:
    """Rows minus their mean: distances do not change, cancellation in the Gram form goes away."""
    return x - x.mean(0, keepdim=True)


class _Root(torch.autograd.Function):
    """Square roots with a slope of zero at zero, where the diagonal is."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor) -> Tensor:
        root = squared.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        zero = root == 0
        return (grads[0] / (2 * root.masked_fill(zero, 1.0))).masked_fill(zero, 0.0)


class _OffsetRoot(torch.autograd.Function):
    """|x_i - x_j + 1e-6|_2 from the squared distances and the rows' sums over their D coordinates."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor, sums: Tensor, width: int) -> Tensor:
        shift = (2 * OFFSET) * (sums[:, None] - sums[None, :]) + width * OFFSET**2
        root = shift.add_(squared).clamp_(min=OFFSET**2 / 100).sqrt_()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (root,) = ctx.saved_tensors
        slope = grads[0] / (2 * root)
        slope = slope.masked_fill(root <= OFFSET / 10, 0.0)
        return slope, (2 * OFFSET) * (slope.sum(1) - slope.sum(0)), None


class Pairwise:
    """Distances between the N rows of one (N, D) tensor, each form computed when it is first read.

    The squared distances are |x_i|^2 + |x_j|^2 - 2 x_i.x_j of the centred rows in float64, then cast to float32 (to
    float64 for float64 rows). The diagonal is exactly zero. Rows closer than 1e-6, or than the rounding of the Gram
    form, count as coincident: distance 1e-6 and no gradient, as with the clamp of the RKD reference code. Autocast does
    not reach in. A Pairwise stays in the gradient mode in which it was made. Raises ``UserError`` unless x is (N, D)
    floating point.
    """

    def __init__(self, x: Tensor):
        if x.ndim != 2 or not x.is_floating_point():
            raise UserError(
                f"distances need embeddings as an (N, D) floating-point tensor; got {tuple(x.shape)} of {x.dtype}."
            )
        self._grad = torch.is_grad_enabled()
        self.x = at_least_float32(x)

    @staticmethod
    def of(x: Union[Tensor, "Pairwise"]) -> "Pairwise":
        """x itself if it is a Pairwise; inside :func:`sharing` the one already made for this tensor; or a new one."""
        if isinstance(x, Pairwise):
            return x
        shared = _shared.get()
        if shared is None:
            return Pairwise(x)
        key = (id(x), torch.is_grad_enabled())
        if key not in shared:
            shared[key] = (x, Pairwise(x))  # holding x keeps its id from being reused
        return shared[key][1]

    def __len__(self) -> int:
        return self.x.shape[0]

    @cached_property
    def _found(self) -> tuple[Tensor, ...]:
        with torch.no_grad(), full_precision(self.x):
            return _found(self.x)

    @cached_property
    def squared(self) -> Tensor:
        """(N, N) squared Euclidean distances."""
        with torch.set_grad_enabled(self._grad):
            return _Squared.apply(self.x, False, *self._found)  # type: ignore[no-any-return, no-untyped-call]

    @cached_property
    def squared_for_symmetric(self) -> Tensor:
        """The same, for losses whose gradient is a symmetric matrix with a diagonal of zeros: a shorter way back."""
        with torch.set_grad_enabled(self._grad):
            return _Squared.apply(self.x, True, *self._found)  # type: ignore[no-any-return, no-untyped-call]

    @cached_property
    def distances(self) -> Tensor:
        """(N, N) Euclidean distances."""
        with torch.set_grad_enabled(self._grad):
            return _Root.apply(self.squared)  # type: ignore[no-any-return, no-untyped-call]

    @cached_property
    def gram(self) -> Tensor:
        """(N, N) inner products of the rows as they are, not centred, in the precision of the rows."""
        with torch.set_grad_enabled(self._grad), full_precision(self.x):
            return self.x @ self.x.T

    def offset_distances(self, p: int = 2) -> Tensor:
        """(N, N) of |x_i - x_j + 1e-6|_p, as ``torch.nn.functional.pairwise_distance`` defines it; p is 1 or 2.

        For p = 2 through |a + e|^2 = |a|^2 + 2 e sum(a) + D e^2, so that no (N, N, D) tensor is made.
        """
        with torch.set_grad_enabled(self._grad), full_precision(self.x):
            if p == 1:
                return torch.cdist(self.x + OFFSET, self.x, p=1.0)
            return _OffsetRoot.apply(self.squared, self.x.sum(1), self.x.shape[1])  # type: ignore[no-any-return, no-untyped-call]


def paired(student: Tensor | Pairwise, teacher: Tensor | Pairwise) -> tuple[Pairwise, Pairwise]:
    """Both as :class:`Pairwise`; ``UserError`` unless they describe the same number of images."""
    first, second = Pairwise.of(student), Pairwise.of(teacher)
    if len(first) != len(second):
        raise UserError(
            f"student and teacher must embed the same images; got {len(first)} and {len(second)} rows of embeddings."
        )
    return first, second


_shared: ContextVar[dict[tuple[int, bool], tuple[Tensor, Pairwise]] | None] = ContextVar("shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Within this context, meant for one training step, one tensor has one :class:`Pairwise`: terms share it."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)
