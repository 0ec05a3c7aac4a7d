"""Nested embeddings: the first numbers of an embedding are one too, so that a student has several lengths at once.

Kusupati et al.: Matryoshka Representation Learning, NeurIPS 2022, arXiv 2205.13147 [M].
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from metric_kd.distances import unit_rows
from metric_kd.errors import UserError
from metric_kd.losses.term import PairTerm, Seen, Term

READ = "embedding"


def prefix(embedding: Tensor, length: int, unit: bool) -> Tensor:
    """(N, length): the first numbers of (N, D) embeddings, with ``unit`` scaled to length 1; all D of them as they are."""
    if length == embedding.shape[1]:
        return embedding
    return unit_rows(embedding[:, :length]) if unit else embedding[:, :length]


def prefixes_seen(seen: Seen, lengths: Sequence[int], unit: bool) -> list[Seen]:
    """What a term sees of every prefix of the student's embedding, and last of the whole; the teacher stays whole."""
    student = seen.student
    if student is None or student.embedding is None:
        return [seen]
    parts = [prefix(student.embedding, length, unit) for length in lengths]
    return [*(seen._replace(student=student._replace(embedding=part)) for part in parts), seen]


def check_nested(terms: Iterable[tuple[str, Term]], lengths: Sequence[int], width: int | None) -> None:
    """Raise ``UserError`` for terms that cannot be taken of prefixes, and for prefixes that are none.

    width: of the student's embedding, None where no term reads it.
    """
    if width is None:
        raise UserError(
            "--nested needs a loss of the embedding, as --loss rkd_distance:1; add one or leave --nested out."
        )
    if lengths and max(lengths) >= width:
        raise UserError(
            f"--nested {max(lengths)} is no shorter than the embedding, of {width} numbers, which is always taken whole as "
            "well; give shorter prefixes."
        )
    for name, term in terms:
        if READ not in term.needs:
            continue
        if isinstance(term, PairTerm):
            raise UserError(f"loss {name!r} runs the networks itself, with whole embeddings; leave it or --nested out.")
        if term.anchors:
            raise UserError(
                f"loss {name!r} compares student and teacher number by number, which takes equal lengths; leave it or "
                "--nested out."
            )
        if [*term.parameters(), *term.buffers()]:
            raise UserError(
                f"loss {name!r} keeps a trained part or a memory for embeddings of one length; leave it or --nested out."
            )
