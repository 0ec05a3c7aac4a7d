"""Objective: a weighted sum of terms, and the one spelling in which a user writes it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from metric_kd.distances import sharing
from metric_kd.distributed import common_draws
from metric_kd.errors import UserError
from metric_kd.losses.gradients import gradient_norms
from metric_kd.losses.nested import READ, check_nested, prefixes_seen
from metric_kd.losses.spec import LossSpec, option_names, parse_loss
from metric_kd.losses.term import TERMS, Pair, PairTerm, Seen, Stage, Term
from metric_kd.models.layers import LAYER
from metric_kd.types import Batch, Output

__all__ = ["LossSpec", "Objective", "option_names", "parse_loss", "require_provided", "wanted_of_teacher"]


class Objective(nn.Module):
    """sum_i weight_i * term_i(student, teacher, batch); terms of weight zero are not built and cost nothing.

    One :class:`~metric_kd.distances.Pairwise` per tensor is shared by all terms of a step. :meth:`enter` chooses which
    terms act: all that act in the main stage (the state in which it starts), or one term in a stage of its own. Raises
    ``UserError`` where no term is left for the main stage.

    nested: lengths of prefixes of the student's embedding. A term that reads it is then the mean of what it gives for every
    prefix and for the whole (:mod:`metric_kd.losses.nested`; the paper adds them up), others count once. unit: whether
    embeddings, and so prefixes, have length 1.
    """

    def __init__(self, losses: Sequence[LossSpec], nested: Sequence[int] = (), unit: bool = False):
        super().__init__()
        self.nested, self.unit = tuple(nested), unit
        active = [loss for loss in losses if loss.weight != 0]
        if not active:
            raise UserError("every loss has weight zero; give at least one, as in --loss rkd_distance:1.")
        self.terms = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        for loss in active:
            key = loss.name.replace(".", "_")  # a dot would be a path inside the module
            while key in self.terms:  # the same term twice, with other options
                key += "_"
            self.terms[key] = TERMS[loss.name](**loss.options)
            self.weights[key] = loss.weight
        if not any(term.acts_in_main for term in self._terms()):
            raise UserError(
                f"loss {active[0].name!r} only acts in a stage of its own; add a loss for the main stage, as in "
                "--loss cross_entropy:1."
            )
        self.stage: tuple[str, Stage] | None = None
        self.norms: list[Tensor] | None = None
        """Where it is a list, :meth:`forward` adds the norms of :func:`gradient_norms` to it, one for each of ``names``."""
        self._main = {key: self.weights[key] for key, term in self.items() if term.acts_in_main}

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def stages(self) -> list[tuple[str, Stage]]:
        """(term, stage) of everything that comes before the main stage, in order."""
        return [(key, stage) for key, term in self.items() for stage in term.stages()]

    def enter(self, stage: tuple[str, Stage] | None) -> None:
        """Begin one of :meth:`stages`, or with None the main stage."""
        self.stage = stage
        for key, term in self.items():
            term.enter(stage[1].name if stage is not None and stage[0] == key else None)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the weights of an epoch (from 1) of the main stage. Raises ``UserError`` where all are zero."""
        self._main = {
            key: weight
            for key, term in self.items()
            if term.acts_in_main and (weight := self.weights[key] * term.schedule(epoch, epochs)) != 0
        }
        if not self._main:
            raise UserError(
                f"in epoch {epoch} the schedules of {', '.join(self.names)} leave no loss; add one that always acts, "
                "as in --loss cross_entropy:1."
            )

    @property
    def acting(self) -> dict[str, float]:
        """The terms that act now, and their weights; a stage in which the student rests has weight 1."""
        if self.stage is None:
            return self._main
        key, stage = self.stage
        return {key: self.weights[key] if stage.trains_student else 1.0}

    @property
    def runs_student(self) -> bool:
        """Whether the student's output is read at all."""
        return self.stage is None or self.stage[1].trains_student

    @property
    def student_needs(self) -> tuple[str, ...]:
        """Fields of ``Output`` that some acting term reads from the student."""
        return self._needs(self.acting) if self.runs_student else ()

    @property
    def teacher_needs(self) -> tuple[str, ...]:
        """Fields that some acting term reads from the teacher; empty where no term has a teacher."""
        return self._needs(self.acting, teacher=True)

    @property
    def all_needs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(student's, teacher's) fields that the terms read in any stage."""
        return self._needs(self.weights), self._needs(self.weights, teacher=True)

    @property
    def related(self) -> list[str]:
        """The acting terms that relate samples, and so need those of all processes."""
        return [key for key in self.acting if self._term(key).relates]

    @property
    def related_needs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(student's, teacher's) fields that those read."""
        return self._needs(self.related) if self.runs_student else (), self._needs(self.related, teacher=True)

    @property
    def differentiates(self) -> bool:
        """Whether some acting term takes gradients of what the networks give."""
        return any(self._term(key).differentiates for key in self.acting)

    def build(self, student: Output, teacher: Output | None, num_classes: int, pair: Pair | None = None) -> None:
        """Let every term create its trained parts from the outputs for two example images."""
        for key, term in self.items():
            if isinstance(term, PairTerm):
                term.build(_the_pair(key, pair))
            else:
                term.build(student, teacher if term.reads_teacher else None, num_classes)
        if self.nested:
            check_nested(self.items(), self.nested, None if student.embedding is None else student.embedding.shape[1])

    def forward(
        self,
        student: Output | None,
        teacher: Output | None,
        batch: Batch,
        pair: Pair | None = None,
        whole: Seen | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted sum, {term: unweighted value, detached}); both stay on the device.

        ``pair``: for terms that see both networks, otherwise not needed. ``whole``: what terms that relate samples see
        instead, where this process has a share of the batch only.
        """
        values: dict[str, Tensor] = {}
        acting, share = self.acting, Seen(student, teacher, batch, pair)
        with sharing():
            if whole is not None:
                with common_draws(batch.labels.device):
                    values = self._values(self.related, whole)
            values |= self._values([key for key in acting if key not in values], share)
        weighted = {key: weight * values[key] for key, weight in acting.items()}
        total = torch.stack(list(weighted.values())).sum()
        if self.norms is not None:
            self._measure(self.norms, weighted, student)
        resting = torch.zeros_like(total.detach())
        return total, {key: values[key].detach() if key in values else resting for key in self.names}

    def _values(self, keys: Sequence[str], seen: Seen) -> dict[str, Tensor]:
        views = prefixes_seen(seen, self.nested, self.unit) if self.nested else [seen]
        return {
            key: torch.stack([self._value(key, view) for view in views]).mean()
            if len(views) > 1 and READ in self._term(key).needs
            else self._value(key, seen)
            for key in keys
        }

    def _measure(self, norms: list[Tensor], weighted: dict[str, Tensor], student: Output | None) -> None:
        found = gradient_norms(weighted, {key: self._term(key) for key in weighted}, student)
        at = torch.tensor([self.names.index(key) for key in weighted], device=found.device)
        norms.append(found.new_zeros(len(self.names)).index_copy(0, at, found))

    def _value(self, key: str, seen: Seen) -> Tensor:
        term = self._term(key)
        theirs = seen.teacher if term.reads_teacher else None
        if self.stage is not None:
            value = term.stage_forward(self.stage[1].name, seen.student, theirs, seen.batch)
        elif isinstance(term, PairTerm):
            value = term(_the_pair(key, seen.pair))
        else:
            value = term(seen.student, theirs, seen.batch)
        if not isinstance(value, Tensor) or value.ndim:
            raise UserError(f"loss {key!r} must return a scalar tensor; average over the batch in its forward.")
        return value

    def _needs(self, keys: Iterable[str], teacher: bool = False) -> tuple[str, ...]:
        terms = [self._term(key) for key in keys]
        if not teacher:
            return tuple(sorted({need for term in terms for need in term.needs}))
        return tuple(sorted({need for term in terms if term.reads_teacher for need in wanted_of_teacher(term)}))

    def _term(self, key: str) -> Term:
        term = self.terms[key]
        assert isinstance(term, Term)
        return term

    def items(self) -> list[tuple[str, Term]]:
        """(name, term) of all terms."""
        return [(key, self._term(key)) for key in self.weights]

    def _terms(self) -> list[Term]:
        return [term for _, term in self.items()]


def _the_pair(key: str, pair: Pair | None) -> Pair:
    if pair is None:
        raise UserError(f"loss {key!r} sees both networks; hand the objective a Pair, as metric_kd.engine.tasks does.")
    return pair


WITHOUT_LOGITS = "train classifiers (--task classification, or --classifier true beside an embedding)"
"""The way out for a network without logits."""


def wanted_of_teacher(term: Term | type[Term]) -> tuple[str, ...]:
    """Fields that a term which reads a teacher reads from it."""
    return term.needs if term.teacher_needs is None else term.teacher_needs


def require_provided(owner: str, provides: frozenset[str], objective: Objective, *, teacher: bool = False) -> None:
    """Refuse, in one sentence, a network (``teacher``: in that role) that cannot give what the terms read.

    Layers by name are looked up in the network itself (:func:`~metric_kd.models.layers.layers_in`).
    """
    for key, term in objective.items():
        wanted = term.needs
        if teacher:
            wanted = wanted_of_teacher(term) if term.reads_teacher else ()
        for need in wanted:
            if need not in provides and not need.startswith(LAYER):
                hint = term.hint or (WITHOUT_LOGITS if need == "logits" else "")
                raise UserError(
                    f"loss {key!r} reads {need}, which the {owner} does not give (it gives "
                    f"{', '.join(sorted(provides))}); {hint and hint + ', or '}choose another loss or another {owner}."
                )
