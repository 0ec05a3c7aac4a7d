"""How hard every summand of an objective pulls at what the student says."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from metric_kd.losses.term import Term
from metric_kd.models.layers import LAYER
from metric_kd.types import Output


def gradient_norms(weighted: Mapping[str, Tensor], terms: Mapping[str, Term], student: Output | None) -> Tensor:
    """(K,) float64: |d(weight_k L_k) / d y_k|, y_k being all that term k reads of the student; 0 without such a gradient.

    weighted: name -> weight_k L_k, with its graph, which stays; terms: of the same names. Where a term reads several of the
    student's tensors and one is computed from another (maps), what flows through the later one counts at the earlier too.
    Terms that run the student themselves count with what they read of the step's output. Norms of terms that read the
    same tensor, as embeddings, compare exactly; of others they are on different scales.
    """
    norms = []
    for name, value in weighted.items():
        reads = [] if student is None else list(_read(terms[name], student))
        found: tuple[Tensor | None, ...] = ()
        if reads and value.requires_grad:
            found = torch.autograd.grad(value, reads, retain_graph=True, allow_unused=True)
        squares = [gradient.detach().double().square().sum() for gradient in found if gradient is not None]
        norms.append(torch.stack(squares).sum().sqrt() if squares else value.new_zeros((), dtype=torch.float64))
    return torch.stack(norms)


def _read(term: Term, student: Output) -> Iterator[Tensor]:
    """The tensors of the student that a term reads and a gradient can reach."""
    for need in term.needs:
        taps: Mapping[str, Any] = student.taps or {}
        value = taps.get(need.removeprefix(LAYER)) if need.startswith(LAYER) else getattr(student, need)
        entries = [value] if isinstance(value, Tensor) else value or ()
        yield from (entry for entry in entries if isinstance(entry, Tensor) and entry.requires_grad)
