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
    """(N, D) rows to (N, N) squared distances; products in float64, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = _centred(x)
        gram = rows @ rows.T
        lengths = gram.diagonal().clone()
        both = lengths[:, None] + lengths[None, :]
        squared = gram.mul_(-2).add_(both)
        # What the Gram form cannot tell from zero: a few roundings of the two lengths. NaN compares false and stays.
        coincident = squared <= both.mul_(8 * torch.finfo(torch.float64).eps).clamp_(min=COINCIDENT)
        coincident.fill_diagonal_(True)
        squared.masked_fill_(coincident, COINCIDENT)
        squared.fill_diagonal_(0.0)
        ctx.save_for_backward(x, coincident)
        return squared.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, coincident = ctx.saved_tensors
        with full_precision(x):
            rows = _centred(x)
            weight = grads[0].masked_fill(coincident, 0.0).double()
            weight = weight + weight.T
            return (2 * (weight.sum(1, keepdim=True) * rows - weight @ rows)).to(x.dtype)


def _centred(x: Tensor) -> Tensor:
    """Rows in float64 minus their mean: distances do not change, cancellation in the Gram form goes away."""
    rows = x.double()
    return rows - rows.mean(0, keepdim=True)


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
    def squared(self) -> Tensor:
        """(N, N) squared Euclidean distances."""
        with torch.set_grad_enabled(self._grad), full_precision(self.x):
            return _Squared.apply(self.x)  # type: ignore[no-any-return, no-untyped-call]

    @cached_property
    def distances(self) -> Tensor:
        """(N, N) Euclidean distances."""
        with torch.set_grad_enabled(self._grad):
            own = torch.eye(len(self), dtype=torch.bool, device=self.x.device)
            # The root of the diagonal would have an infinite slope: take it of one, and put the zeros back.
            return (self.squared + own).sqrt().masked_fill(own, 0.0)

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
            sums = self.x.sum(1)
            shift = (2 * OFFSET) * (sums[:, None] - sums[None, :]) + self.x.shape[1] * OFFSET**2
            return (self.squared + shift).clamp(min=OFFSET**2 / 100).sqrt()


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
