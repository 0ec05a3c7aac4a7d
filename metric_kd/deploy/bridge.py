"""Bridge: a map, fitted in closed form after training, from the student's space into the teacher's."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metric_kd.errors import UserError, one_of

KINDS = ("ridge", "procrustes")
STRENGTHS = tuple(10.0**k for k in range(-6, 2))
"""Ridge strengths that are tried, in units of the mean variance of the student's coordinates."""

RANK = 1e-12
"""Of the largest eigenvalue: below it a direction holds rounding only."""


class Bridge(NamedTuple):
    """x -> (x - mean) weight + shift: (D,) and (D, E) and (E,), float32; kind: how it was fitted."""

    weight: Tensor
    mean: Tensor
    shift: Tensor
    kind: str

    def __call__(self, x: Tensor) -> Tensor:
        """(N, D) student's embeddings to (N, E) in the teacher's space, as long as they come out."""
        if x.shape[1] != len(self.mean):
            raise UserError(
                f"the bridge takes embeddings of length {len(self.mean)}, got {x.shape[1]}; use the student it belongs to."
            )
        return (x.to(self.weight) - self.mean) @ self.weight + self.shift

    def state(self) -> dict[str, Any]:
        """For a checkpoint; :func:`bridge_from` reads it."""
        return self._asdict()


def bridge_from(state: dict[str, Any]) -> Bridge:
    return Bridge(**state)


def fit_bridge(student: Tensor, teacher: Tensor, kind: str = "ridge", strength: float | None = None) -> Bridge:
    """The map that brings (N, D) student's embeddings to the (N, E) teacher's of the same images, least squares.

    With centred rows S and T:

        ridge: W = (S^T S + N v strength I)^-1 S^T T, v the mean variance of S's coordinates;
        procrustes: W = c U V^T with S^T T = U diag(sigma) V^T, c = sum sigma / |S U V^T|^2: a rotation and one scale, which
        keeps the student's own order of neighbours (D <= E; U V^T has orthonormal rows then).

    strength: of the ridge; None: of ``STRENGTHS`` the one with the least generalised cross-validation error
    |T - S W|^2 / (N - 1 - df)^2, the 1 being the mean. In float64. Raises ``UserError`` for fewer than two images, unequal
    numbers, values that are not finite, an unknown kind, or a negative strength.

    Hoerl, Kennard: Ridge Regression, 1970; Golub, Heath, Wahba: Generalized Cross-Validation, 1979; Schoenemann: A
    generalized solution of the orthogonal Procrustes problem, 1966 [M].
    """
    if kind not in KINDS:
        raise one_of("bridge", kind, list(KINDS))
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
        raise UserError(
            "a bridge is fitted on embeddings of the same two or more images; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if strength is not None and not strength >= 0:
        raise UserError(f"the strength of a bridge is {strength:g}; give 0 or more.")
    ours, theirs = student.double(), teacher.double()
    if not (torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        raise UserError("the embeddings hold values that are not finite; a bridge cannot be fitted on them.")
    mean, shift = ours.mean(0), theirs.mean(0)
    ours, theirs = ours - mean, theirs - shift
    weight = _rotation(ours, theirs) if kind == "procrustes" else _ridge(ours, theirs, strength)
    return Bridge(weight.float(), mean.float(), shift.float(), kind)


def _rotation(ours: Tensor, theirs: Tensor) -> Tensor:
    left, sizes, right = torch.linalg.svd(ours.T @ theirs, full_matrices=False)
    turned = left @ right
    return turned * (sizes.sum() / (ours @ turned).square().sum().clamp(min=1e-300))


def _ridge(ours: Tensor, theirs: Tensor, strength: float | None) -> Tensor:
    spectrum, basis = torch.linalg.eigh(ours.T @ ours)
    spectrum = spectrum.clamp(min=0)
    unit = spectrum.mean().clamp(min=1e-300)
    crossed = basis.T @ (ours.T @ theirs)
    used = spectrum > RANK * spectrum.max()  # directions that the images span
    along, left = spectrum[used], len(ours) - 1 - int(used.sum())
    pulled = crossed[used].square().sum(1) / along  # |T|^2 along each of them
    beside = max(float(theirs.square().sum() - pulled.sum()), 0.0) if left > 0 else 0.0

    def error(one: float) -> float:
        # As sums of squares: where there are no more images than numbers, both sides of the ratio are tiny.
        missed = one * unit / (along + one * unit)
        return float((beside + (missed.square() * pulled).sum()) / (left + missed.sum()).square())

    best = min(STRENGTHS, key=error) if strength is None else strength
    return basis @ (crossed / (spectrum + max(best, 1e-12) * unit)[:, None])
