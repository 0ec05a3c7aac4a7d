"""Factory: which structure holds the vectors of an index, in faiss's words: Flat, IVF1024,Flat, IVF1024,PQ32, HNSW32."""

import math
import re
from dataclasses import dataclass

from metric_kd.errors import UserError, one_of

FLAT_BELOW, EXACT_CODES_UP_TO = 100_000, 1_000_000
"""auto: below the first nothing is lost and nothing is slow; above the second full vectors take too much memory."""
CODEBOOK = 256
"""Centroids of every byte of a product quantiser, and so the fewest vectors that it can be trained on."""
SHARE = 32
"""One list of so many is looked into, unless a search says otherwise."""
CANDIDATES = 64
"""Candidates of an HNSW search, unless it says otherwise."""
_FORMS = {
    "Flat": re.compile(r"Flat$"),
    "IVF": re.compile(r"IVF(\d+),Flat$"),
    "IVFPQ": re.compile(r"IVF(\d+),PQ(\d+)$"),
    "HNSW": re.compile(r"HNSW(\d+)$"),
}
_NUMBERS = {"Flat": (), "IVF": ("lists",), "IVFPQ": ("lists", "pieces"), "HNSW": ("links",)}
EXAMPLES = ["Flat", "IVF1024,Flat", "IVF1024,PQ32", "HNSW32", "auto"]


@dataclass(frozen=True)
class Factory:
    """kind: Flat (exact), IVF (lists of full vectors), IVFPQ (lists of ``pieces`` bytes per vector) or HNSW (a graph with
    ``links`` neighbours)."""

    kind: str
    lists: int = 0
    pieces: int = 0
    links: int = 0

    def __str__(self) -> str:
        words = {
            "Flat": "Flat",
            "IVF": f"IVF{self.lists},Flat",
            "IVFPQ": f"IVF{self.lists},PQ{self.pieces}",
            "HNSW": f"HNSW{self.links}",
        }
        return words[self.kind]

    @property
    def effort(self) -> int:
        """Lists that a search looks into, or candidates that it follows, by default; 0 where nothing is to choose."""
        return {"Flat": 0, "HNSW": CANDIDATES}.get(self.kind, min(self.lists, max(8, self.lists // SHARE)))

    @property
    def least(self) -> int:
        """Vectors that it takes to train it."""
        return max(1, self.lists, CODEBOOK if self.pieces else 1)


def parse_factory(text: str) -> Factory:
    """Raises ``UserError`` for what is no factory; "auto" is :func:`choose_factory`'s."""
    for kind, form in _FORMS.items():
        if match := form.match(text):
            numbers = [int(n) for n in match.groups()]
            if any(not 1 <= n <= 1 << 20 for n in numbers) or (kind == "HNSW" and not 2 <= numbers[0] <= 512):
                raise UserError(
                    f"--factory {text} has an impossible number; lists and bytes are 1 or more, links 2..512."
                )
            return Factory(kind, **dict(zip(_NUMBERS[kind], numbers, strict=True)))
    raise one_of("factory", text, EXAMPLES)


def choose_factory(count: int, dimensions: int) -> Factory:
    """Flat below 100,000 vectors, 4 sqrt(N) lists up to a million, beyond that one byte for about four numbers too."""
    if count < FLAT_BELOW:
        return Factory("Flat")
    lists = round(4 * math.sqrt(count))
    if count <= EXACT_CODES_UP_TO:
        return Factory("IVF", lists=lists)
    pieces = max(n for n in range(1, max(1, dimensions // 4) + 1) if dimensions % n == 0)
    return Factory("IVFPQ", lists=lists, pieces=pieces)


def check_factory(factory: Factory, count: int, dimensions: int) -> None:
    """Raise ``UserError`` where so many vectors of this length cannot be held so; cheap, to be called before long work."""
    if factory.pieces and dimensions % factory.pieces:
        fits = [n for n in range(1, dimensions + 1) if dimensions % n == 0]
        raise UserError(
            f"--factory {factory} cuts embeddings of length {dimensions} into {factory.pieces} equal pieces, which does not "
            f"go; choose PQ{min(fits, key=lambda n: (abs(n - factory.pieces), -n))}."
        )
    if count < factory.least:
        raise UserError(
            f"--factory {factory} is trained on {factory.least:,} images or more, and there are {count:,}; choose Flat, which "
            "is exact, or fewer lists."
        )
