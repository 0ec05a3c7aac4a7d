"""The angle loss on CUDA in two kernels, compiled by Triton; imported only where it is used.

No tensor of N^3 entries, no atomic operation and no wait of the host: what programs leave is added by PyTorch in a fixed
order, so that results repeat bit for bit and a CUDA graph can hold the whole.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from metric_kd.distances import COINCIDENT

ANCHORS, ROWS, COLUMNS = 4, 16, 32
"""Triples that a program of :func:`_rows` holds at a time: 16 for each of its 128 threads."""

TILE = 32
"""Edge of the pairs (j, k) of a program of :func:`_pairs`."""

LEAST = COINCIDENT * (1 + 1e-6)
"""A hair more, since numbers travel to a kernel as float32, which must not fall below what float64 distances hold."""

PROGRAMS = 512
"""As many programs of :func:`_pairs` as keep a large card at work; small batches split their anchors for it."""


def angle_gap(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d u as a symmetric matrix) from squared distances of the student (u) and the teacher (v), (N, N).

    The formulas are those of ``distill.relational.rkd_angle.angle_gap_in_tiles``: :func:`_rows` gives S - Q and the
    loss, visiting all triples, :func:`_pairs` gives P, visiting those with k >= j in tiles. Sums are kept in the type
    of u, float32 or float64. Extra memory O(N^2).
    """
    u, v = u.detach().contiguous(), v.detach().contiguous()
    n = u.shape[0]
    rows = torch.empty_like(u)
    grid = (triton.cdiv(n, ANCHORS), triton.cdiv(n, ROWS))
    losses = u.new_empty(grid)
    tiles = triton.cdiv(n, TILE)
    upper = torch.triu_indices(tiles, tiles, device=u.device, dtype=torch.int32)  # (2, pairs of tiles)
    splits = max(1, min(PROGRAMS // upper.shape[1], n // TILE))
    parts = u.new_zeros(splits, n, n)
    with torch.cuda.device_of(u):
        _rows[grid](u, v, rows, losses, n, LEAST, ANCHORS, ROWS, COLUMNS)
        _pairs[(upper.shape[1], splits)](u, v, parts, upper, n, upper.shape[1], triton.cdiv(n, splits), LEAST, TILE)
    half = rows.sub_(parts.sum(0).triu_(1))
    loss = (losses.double().sum() / n**3).to(u.dtype)
    return loss, (half + half.T).fill_diagonal_(0.0).div_(2 * n**3)


@triton.jit  # type: ignore[untyped-decorator]
def _inverse_root(squared, least):  # type: ignore[no-untyped-def]
    """1 / sqrt, 0 for coincident rows and for those beyond the batch; NaN stays."""
    coincident = squared <= least
    return tl.where(coincident, 0.0, 1.0 / tl.sqrt(tl.where(coincident, 1.0, squared)))


@triton.jit  # type: ignore[untyped-decorator]
def _slope(d):  # type: ignore[no-untyped-def]
    """clamp(d, -1, 1); NaN compares false and stays."""
    c = tl.where(d > 1.0, 1.0, d)
    return tl.where(c < -1.0, -1.0, c)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    u,
    v,
    out,
    losses,
    n,
    least,
    ANCHORS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """S - Q of some anchors i and rows j, and their part of the loss: all k pass by."""
    i = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = i[:, None] * n + j[None, :]
    inside = (i[:, None] < n) & (j[None, :] < n)
    u_ij = tl.load(u + at, mask=inside, other=0.0)
    v_ij = tl.load(v + at, mask=inside, other=0.0)
    rho_ij = _inverse_root(u_ij, least)
    r_ij = _inverse_root(v_ij, least)
    s = tl.zeros((ANCHORS, ROWS, COLUMNS), dtype=u_ij.dtype)
    q = tl.zeros((ANCHORS, ROWS, COLUMNS), dtype=u_ij.dtype)
    loss = tl.zeros((ANCHORS, ROWS, COLUMNS), dtype=u_ij.dtype)
    for first in range(0, n, COLUMNS):
        k = first + tl.arange(0, COLUMNS)
        along_i = (i[:, None] < n) & (k[None, :] < n)
        along_j = (j[:, None] < n) & (k[None, :] < n)
        u_ik = tl.load(u + i[:, None] * n + k[None, :], mask=along_i, other=0.0)
        v_ik = tl.load(v + i[:, None] * n + k[None, :], mask=along_i, other=0.0)
        u_jk = tl.load(u + j[:, None] * n + k[None, :], mask=along_j, other=0.0)
        v_jk = tl.load(v + j[:, None] * n + k[None, :], mask=along_j, other=0.0)
        rho_ik = _inverse_root(u_ik, least)
        r_ik = _inverse_root(v_ik, least)
        # A_ijk = ((u_ij - u_jk) rho_ik + sqrt(u_ik)) rho_ij / 2
        a = (u_ij[:, :, None] - u_jk[None, :, :]) * rho_ik[:, None, :] + (rho_ik * u_ik)[:, None, :]
        a *= 0.5 * rho_ij[:, :, None]
        b = (v_ij[:, :, None] - v_jk[None, :, :]) * r_ik[:, None, :] + (r_ik * v_ik)[:, None, :]
        d = a - b * (0.5 * r_ij[:, :, None])
        c = _slope(d)
        loss += c * (d - 0.5 * c)
        s += c * rho_ik[:, None, :]
        q += c * a
    tl.store(out + at, rho_ij * tl.sum(s, 2) - rho_ij * rho_ij * tl.sum(q, 2), mask=inside)
    tl.store(losses + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(tl.sum(loss, 2), 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _pairs(  # type: ignore[no-untyped-def]
    u,
    v,
    parts,
    upper,
    n,
    pairs,
    anchors,
    least,
    TILE: tl.constexpr,  # noqa: N803
):
    """P_jk = sum_i c rho_ij rho_ik of one tile of pairs (j, k), over the anchors of one split."""
    j = tl.load(upper + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    k = tl.load(upper + pairs + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    at = j[:, None] * n + k[None, :]
    inside = (j[:, None] < n) & (k[None, :] < n)
    u_jk = tl.load(u + at, mask=inside, other=0.0)
    v_jk = tl.load(v + at, mask=inside, other=0.0)
    p = tl.zeros((TILE, TILE), dtype=u_jk.dtype)
    first = tl.program_id(1) * anchors
    for i in range(first, tl.minimum(first + anchors, n)):
        u_ij = tl.load(u + i * n + j, mask=j < n, other=0.0)
        v_ij = tl.load(v + i * n + j, mask=j < n, other=0.0)
        u_ik = tl.load(u + i * n + k, mask=k < n, other=0.0)
        v_ik = tl.load(v + i * n + k, mask=k < n, other=0.0)
        rho_ij = _inverse_root(u_ij, least)
        r_ij = _inverse_root(v_ij, least)
        rho_ik = _inverse_root(u_ik, least)
        r_ik = _inverse_root(v_ik, least)
        a = (u_ij[:, None] - u_jk) * rho_ik[None, :] + (rho_ik * u_ik)[None, :]
        b = (v_ij[:, None] - v_jk) * r_ik[None, :] + (r_ik * v_ik)[None, :]
        c = _slope(a * (0.5 * rho_ij)[:, None] - b * (0.5 * r_ij)[:, None])
        p += c * rho_ij[:, None] * rho_ik[None, :]
    tl.store(parts + tl.program_id(1) * n * n + at, p, mask=inside)
