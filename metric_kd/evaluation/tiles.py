"""first_search: which rows of a gallery come near a query, from matrix products of one tile after the other."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Search = Callable[[Tensor], Tensor]
"""(B, D) queries to (B, M) rows of the gallery in ascending order, among them the M nearest up to rounding."""

TILE = 1 << 23
"""Elements of a distance matrix, and of the gallery, that are held at once (32 MiB each at most)."""
GROUP = 32
"""Neighbouring rows of which only the nearest is looked at first; fewer than 32 numbers side by side have a slow minimum."""
CANDIDATES = 1 << 16
"""Candidates that are held at once: where a query has many, fewer queries meet more of the gallery."""
LEAST = 512
"""Queries for which it is worth moving a tile of the gallery."""
ROW = (1 << 29) - 1
"""The bits of a key that hold the row: those by which the mantissa of a float64 is longer than that of a float32."""
TINY = 1e-30
"""Smallest value that a key tells from 0."""


def queries_at_once(block: int, queries: int, count: int) -> int:
    """How many of the queries :func:`first_search` should get together for ``count`` candidates each, ``block`` at most."""
    return min(block, queries, max(LEAST, CANDIDATES // count))


def first_search(gallery: Tensor, count: int, block: int) -> Search:
    """The ``count`` rows of smallest |g|^2 - 2 q.g + c(q), equal ones by row, for up to ``block`` queries at a time.

    q and g are what queries and gallery are beyond the gallery's mean. This is one product of (-2 q, 1, c) and (g, |g|^2, 1),
    which saves two passes over all products. The constant c, the lesser of |q|^2 and 2 |q| max |g|, makes it 0 or more, and
    loses no digits where a query is far from all of the gallery. No copy of the gallery is made but of a tile at a time.
    """
    width = gallery.shape[1]
    tiles = -(-len(gallery) // max(1, TILE // max(block, width + 2)))
    tile = _up(-(-len(gallery) // tiles))  # equal ones: a short last tile would cost as much per query as a long one
    rows, columns, products = torch.empty(tile, width + 2), torch.empty(block, width + 2), torch.empty(block * tile)
    centre = _mean(gallery)
    squares = torch.cat([(part - centre).square_().sum(1) for part in gallery.split(1024)])
    longest = squares.max().sqrt()

    @functools.lru_cache(maxsize=1)  # where there is one tile only, it is moved once
    def tile_at(start: int) -> Tensor:
        part = gallery[start : start + tile]
        moved = rows[: _up(len(part))]
        torch.sub(part, centre, out=moved[: len(part), :width])
        moved[: len(part), width] = squares[start : start + tile]
        moved[:, width + 1] = 1
        moved[len(part) :, :width], moved[len(part) :, width] = 0, torch.inf  # what its last group lacks
        return moved

    def search(queries: Tensor) -> Tensor:
        queries = queries - centre
        asked = columns[: len(queries)]
        torch.mul(queries, -2, out=asked[:, :width])
        own = torch.linalg.vecdot(queries, queries)
        asked[:, width], asked[:, width + 1] = 1, torch.minimum(own, 2 * (own.sqrt() * longest))
        best = torch.empty(len(queries), 0, dtype=torch.int64)
        with _whole_products():
            for start in range(0, len(gallery), tile):
                offered = tile_at(start)
                far = products[: len(asked) * len(offered)].view(len(asked), len(offered))
                best = _merge(best, torch.mm(asked, offered.T, out=far), start, count)
        return (best & ROW).sort(1).values

    return search


def _up(rows: int) -> int:
    """The least multiple of ``GROUP`` that holds them."""
    return -(-rows // GROUP) * GROUP


def _mean(x: Tensor) -> Tensor:
    """The mean row, summed in float64 and without a copy of all of them in it."""
    parts = (part.sum(0, dtype=torch.float64) for part in x.split(1024))
    return (sum(parts, torch.zeros(x.shape[1], dtype=torch.float64)) / len(x)).float()


def _merge(best: Tensor, far: Tensor, start: int, count: int) -> Tensor:
    """(B, <= count) keys, the smallest among ``best`` and the entries of (B, T), whose columns are the rows from ``start``."""
    if far.shape[1] < 2 * count * GROUP:
        keys = _smallest(_key(far, torch.arange(far.shape[1])), count) + start
        joined = torch.cat([best, keys], 1)
    else:
        joined = _joined(best, *_promising(best, far, start, count))
    return _smallest(joined, count)


def _promising(best: Tensor, far: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """(M,) queries in ascending order and (M,) keys of entries of (B, T), among which are all that belong among the smallest.

    The count smallest entries lie in those count groups whose smallest entries are the smallest: an entry in another group has
    before it the smallest entry of each of these, also where values are equal, as a lower group has lower rows. None of them
    is above the last of these smallest entries, nor above the last of ``best`` where that is full.
    """
    far = far.view(len(far), -1, GROUP)
    lowest = _smallest(_key(far.amin(2), torch.arange(far.shape[1])), count)
    bound = _value(lowest.amax(1, keepdim=True))
    if best.shape[1] == count:
        bound = torch.minimum(bound, _value(best.amax(1, keepdim=True)))
    near = _value(lowest) <= bound
    query, group = near.nonzero()[:, 0], lowest[near] & ROW
    values = far.view(-1, GROUP).index_select(0, query * far.shape[1] + group)  # by far the fastest way to fetch them
    found = (values <= bound.index_select(0, query)).flatten().nonzero()[:, 0]
    member = found // GROUP
    rows = group.index_select(0, member) * GROUP + found % GROUP + start
    return query.index_select(0, member), _key(values.flatten().index_select(0, found), rows)


def _joined(best: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """``best`` with the keys of each query behind its own, and behind these, as queries have unequal numbers, the largest."""
    counts = query.bincount(minlength=len(best))
    column = best.shape[1] + torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    joined = torch.full((len(best), best.shape[1] + int(counts.max())), torch.iinfo(torch.int64).max)
    joined[:, : best.shape[1]] = best
    joined[query, column] = keys
    return joined


def _smallest(keys: Tensor, count: int) -> Tensor:
    return keys.topk(min(count, keys.shape[1]), largest=False, sorted=False).values


def _key(values: Tensor, rows: Tensor) -> Tensor:
    """int64 in the order of (float32 value, row), for values of 0 or more up to rounding."""
    return values.clamp(min=TINY).double().view(torch.int64).bitwise_or_(rows)


def _value(keys: Tensor) -> Tensor:
    return (keys & ~ROW).view(torch.float64).float()


@contextlib.contextmanager
def _whole_products() -> Iterator[None]:
    """Products of float32 numbers in float32, where torch was allowed to take them in less."""
    onednn = getattr(torch.backends.mkldnn, "matmul", None)
    if onednn is None:  # before torch 2.9
        kept = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    else:
        kept, onednn.fp32_precision = onednn.fp32_precision, "ieee"
    try:
        yield
    finally:
        if onednn is None:
            torch.set_float32_matmul_precision(kept)
        else:
            onednn.fp32_precision = kept
