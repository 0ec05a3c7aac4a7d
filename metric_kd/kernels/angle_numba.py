"""The angle loss on the CPU in one pass over the triples, compiled by numba; imported only where it is used."""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from metric_kd.distances import COINCIDENT

LANES = 16
"""Columns that are handled together: one register of AVX-512 in float32, two of AVX2. Rows are padded to whole ones."""

ANCHORS = 8
"""Anchors for which a block of rows stays in the second-level cache."""

SCRATCH = 9
"""Rows of scratch for each anchor: rho, sqrt(u), the same two of the teacher, five sums."""

# Sums may be reordered and products fused; NaN and infinity keep their meaning, so that they reach the loss.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}


def angle_gap(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d u as a symmetric matrix) from squared distances of the student (u) and the teacher (v), (N, N).

    The formulas are those of ``distill.relational.rkd_angle.angle_gap_in_tiles``. A_ijk = A_ikj, so that only k >= j is
    visited: blocks of 16 x 16 pairs (j, k) on the diagonal in full, those to the right of it with both their row sums
    and their column sums. Sums are kept in the type of u, those of the loss over more than one row in float64.

    u, v: on the CPU, float32 or float64, N >= 1. Anchors are split into groups by N alone and their parts of P added in
    order, so that the result does not depend on ``torch.get_num_threads()``, which says how many groups run at once.
    Extra memory is O(N^2) per thread.
    """
    n = u.shape[0]
    columns = -(-n // LANES) * LANES
    student, teacher = _padded(u.detach(), columns), _padded(v.detach(), columns)
    rows, losses = torch.empty_like(student), torch.empty(n, dtype=torch.float64)
    groups = max(1, min(16, n // 64))
    bounds = [n * g // groups for g in range(groups + 1)]
    threads = min(groups, torch.get_num_threads())
    parts = u.new_empty(threads, n, columns)  # of P, one for each group that runs
    scratch = u.new_empty(threads, ANCHORS, SCRATCH, columns)
    constants = np.array([0.0, 0.5, 1.0, COINCIDENT], dtype=student.numpy().dtype)
    shared = tuple(x.numpy() for x in (student, teacher, rows, losses))

    def run(group: int) -> None:
        own = group % threads
        _call(*shared, parts[own].numpy(), scratch[own].numpy(), constants, bounds[group], bounds[group + 1])

    p = _sum_in_order(run, parts, groups, threads)
    loss = (losses.sum() / n**3).to(u.dtype)
    half = rows.sub_(p.triu_(1))[:, :n]
    return loss, (half + half.T).fill_diagonal_(0.0).div_(2 * n**3)


def _sum_in_order(run: Callable[[int], None], parts: Tensor, groups: int, threads: int) -> Tensor:
    """Run all groups, ``threads`` of them at a time, and add what each leaves in its part, in the order of groups."""
    if groups == 1:
        run(0)
        return parts[0]
    p = torch.zeros_like(parts[0])
    if threads == 1:
        for group in range(groups):
            run(group)
            p += parts[0]
        return p
    # Threads of Python, which numba leaves alone to run: its own pools end the process where two threads enter them,
    # or where it was forked. They end with the call, so that a fork finds none.
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, groups, threads):
            count = len(list(pool.map(run, range(first, min(first + threads, groups)))))
            for part in parts[:count]:
                p += part
    return p


def _padded(x: Tensor, columns: int) -> Tensor:
    """(N, columns), zero on the right: rows at distance zero, which form no angle."""
    if x.shape[1] == columns:
        return x.contiguous()
    wide = x.new_zeros(x.shape[0], columns)
    wide[:, : x.shape[1]] = x
    return wide


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _start(ui, vi, scratch, constants):  # type: ignore[no-untyped-def]
    """rho and sqrt(u) of one anchor, the same of the teacher, and sums of zero."""
    zero, one, least = constants[0], constants[2], constants[3]
    scratch[4:] = zero
    for side in range(2):
        x = ui if side == 0 else vi
        root, length = scratch[2 * side], scratch[2 * side + 1]
        for k in range(len(x)):
            root[k] = zero if x[k] <= least else one / np.sqrt(x[k])
            length[k] = root[k] * x[k]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _on_diagonal(i, u, v, p, anchor, first, constants):  # type: ignore[no-untyped-def]
    """A block on the diagonal for anchor i: both halves are visited, so that the sums over columns are enough."""
    half, one = constants[1], constants[2]
    last = first + LANES
    rho, length = anchor[0, first:last], anchor[1, first:last]
    r, teacher_length = anchor[2, first:last], anchor[3, first:last]
    column_s, column_q, gaps = anchor[4, first:last], anchor[5, first:last], anchor[8, first:last]
    for j in range(first, min(last, len(u))):
        x, y, part = u[j, first:last], v[j, first:last], p[j, first:last]
        a, b, g = u[i, j], v[i, j], anchor[0, j]
        scale, teacher_scale = half * g, half * anchor[2, j]
        for k in range(LANES):
            s = (a - x[k]) * rho[k] + length[k]
            d = scale * s - teacher_scale * ((b - y[k]) * r[k] + teacher_length[k])
            c = one if d > one else d  # NaN compares false and stays
            c = -one if c < -one else c
            gaps[k] += c * (d - half * c)
            e = c * g
            column_s[k] += e
            column_q[k] += e * s
            part[k] += e * rho[k]


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _beside(i, u, v, p, anchor, first, constants):  # type: ignore[no-untyped-def]
    """What lies right of that block: sums over columns, and over rows of c rho and c s; gives the loss, in float64.

    s = (u_ij - u_jk) rho_ik + sqrt(u_ik), so that A_ijk = s rho_ij / 2: 16 operations for each triple.
    """
    zero, half, one = constants[0], constants[1], constants[2]
    last = first + LANES
    rho, length = anchor[0, last:], anchor[1, last:]
    r, teacher_length = anchor[2, last:], anchor[3, last:]
    column_s, column_q = anchor[4, last:], anchor[5, last:]
    total = 0.0
    for j in range(first, last):
        x, y, part = u[j, last:], v[j, last:], p[j, last:]
        a, b, g = u[i, j], v[i, j], anchor[0, j]
        scale, teacher_scale = half * g, half * anchor[2, j]
        loss, row_s, row_q = zero, zero, zero
        for k in range(len(rho)):
            s = (a - x[k]) * rho[k] + length[k]
            d = scale * s - teacher_scale * ((b - y[k]) * r[k] + teacher_length[k])
            c = one if d > one else d
            c = -one if c < -one else c
            loss += c * (d - half * c)
            row_s += c * rho[k]
            row_q += c * s
            e = c * g
            column_s[k] += e
            column_q[k] += e * s
            part[k] += e * rho[k]
        anchor[6, j], anchor[7, j] = row_s, row_q
        total += np.float64(loss)
    return total


@numba.njit(**_OPTIONS)  # type: ignore[untyped-decorator]
def _finish(scratch, out, constants):  # type: ignore[no-untyped-def]
    """S - Q of one anchor; gives the loss on the diagonal blocks."""
    half = constants[1]
    total = 0.0
    for k in range(len(out)):
        g = scratch[0, k]
        total += np.float64(scratch[8, k])
        s, q = scratch[6, k] + scratch[4, k], half * (g * scratch[7, k] + scratch[5, k])
        out[k] = g * s - g * g * q
    return total


def _anchors(u, v, rows, losses, p, scratch, constants, first, last):  # type: ignore[no-untyped-def]
    """Anchors first .. last - 1: their rows of S - Q, their losses, and their part of P in the blocks with k >= j."""
    p[:] = constants[0]
    for begin in range(first, last, ANCHORS):
        count = min(ANCHORS, last - begin)
        for own in range(count):
            _start(u[begin + own], v[begin + own], scratch[own], constants)
            losses[begin + own] = 0.0
        for block in range(0, u.shape[1], LANES):
            for own in range(count):
                _on_diagonal(begin + own, u, v, p, scratch[own], block, constants)
                if block + LANES < u.shape[1]:
                    losses[begin + own] += 2.0 * _beside(begin + own, u, v, p, scratch[own], block, constants)
        for own in range(count):
            losses[begin + own] += _finish(scratch[own], rows[begin + own], constants)


def _compile(cache: bool) -> Callable[..., None]:
    return numba.njit(cache=cache, **_OPTIONS)(_anchors)  # type: ignore[no-any-return]


_compiled: list[Callable[..., None]] = []
_starting = threading.Lock()


def _call(*arguments: Any) -> None:
    """The compiled kernel; where its cache on disk cannot be used, compiled for this process, with one warning."""
    if not _compiled:
        with _starting:  # threads come here together: one tries, the others wait for what works
            if not _compiled:
                _compiled.append(_tried(*arguments))
                return
    _compiled[0](*arguments)


def _tried(*arguments: Any) -> Callable[..., None]:
    """The kernel that has served a first call."""
    try:
        kernel = _compile(cache=True)
        kernel(*arguments)
    except Exception as error:  # no place to write, a full disk, a damaged file: numba lets them all through
        warnings.warn(
            f"numba could not keep its kernel on disk ({error}); it is compiled anew in each process.", stacklevel=2
        )
        kernel = _compile(cache=False)
        kernel(*arguments)
    return kernel
