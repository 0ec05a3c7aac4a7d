"""How alike two networks lay out the same images, without labels."""

import torch
from torch import Tensor

from metric_kd.errors import UserError
from metric_kd.evaluation.search import find_neighbours

NEIGHBOURS = 10
AT_ONCE = 1 << 22
"""Pairs of neighbours that are compared at once (4 MiB)."""


def neighbours_of(vectors: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """(N, k) rows of the k nearest other vectors (Euclidean), nearest first. Raises ``UserError`` for k or fewer vectors."""
    check_count(len(vectors), k)
    return find_neighbours(vectors, k=k, query_labels=vectors.new_zeros(len(vectors))).indices


def share_of(one: Tensor, other: Tensor) -> float:
    """(1/N) sum_n |S_n and T_n| / k, where row n of ``one`` (N, k) is S_n, of ``other`` T_n, each without duplicates.

    Of the neighbours of student and teacher: 1 where the student is a turned and scaled copy, k / (N - 1) where it knows
    nothing. Raises ``ValueError`` for rows of other images.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"neighbours of shapes {tuple(one.shape)} and {tuple(other.shape)} are not of the same images."
        )
    return float(shared_counts(one, other).sum()) / one.numel()


def shared_counts(one: Tensor, other: Tensor) -> Tensor:
    """(N,) int64: how many entries of a row of ``one`` (N, k) are also in that row of ``other`` (N, k); -1 is no entry."""
    rows = max(1, AT_ONCE // max(1, one.shape[1] * other.shape[1]))
    parts = zip(one.split(rows), other.split(rows), strict=True)
    found = [((a[:, :, None] == b[:, None, :]).any(2) & (a >= 0)).sum(1) for a, b in parts]
    return torch.cat(found)


def check_count(images: int, k: int = NEIGHBOURS) -> None:
    """Raise ``UserError`` where so few images have no k neighbours."""
    if images <= k:
        raise UserError(f"{images} images have no {k} neighbours each; give more images.")
