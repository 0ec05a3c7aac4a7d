"""The whole batch, for terms that relate samples, where several processes share it. A task gathers it once in a step."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from metric_kd.distributed import all_gather, world_size
from metric_kd.losses.objective import Objective
from metric_kd.losses.term import Pair, Seen
from metric_kd.models.layers import LAYER
from metric_kd.types import Batch, Output


class GatheredMaps(Sequence[Tensor]):
    """The stage maps of all processes, each gathered when it is first read.

    Early maps are large and few terms read them. Not a tuple, so that nothing takes a process's own maps for the whole.
    """

    def __init__(self, maps: Sequence[Tensor]):
        self._share = maps
        self._whole: dict[int, Tensor] = {}
        self._constant = False

    def __len__(self) -> int:
        return len(self._share)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        if place not in self._whole:
            self._whole[place] = all_gather(self._share[place])
        return self._whole[place].detach() if self._constant else self._whole[place]

    def detach(self) -> "GatheredMaps":
        """The same maps as constants; what one of the two has gathered, both have."""
        other = GatheredMaps(self._share)
        other._whole, other._constant = self._whole, True
        return other


def whole_batch(
    objective: Objective, student: Output | None, teacher: Output | None, batch: Batch, pair: Pair | None = None
) -> Seen | None:
    """What all processes together see of a step; None where one has it all, or no acting term relates samples."""
    if world_size() == 1 or not objective.related:
        return None
    ours, theirs = objective.related_needs
    student, batch = gathered(student, ours), gathered_batch(batch)
    teacher = gathered(teacher, theirs, constant=True)
    if pair is not None and student is not None and teacher is not None:
        pair = pair._replace(student_output=student, teacher_output=teacher, batch=batch)
    return Seen(student, teacher, batch, pair)


def gathered(output: Output | None, fields: Collection[str], constant: bool = False) -> Output | None:
    """The given fields of an output, of all processes; ``constant``: without gradient."""
    if output is None:
        return None
    output = detached(output) if constant else output

    def maps(name: str) -> Any:
        value = getattr(output, name)
        return GatheredMaps(value) if value is not None and name in fields else None

    def rows(name: str) -> Tensor | None:
        value = getattr(output, name)
        return all_gather(value) if value is not None and name in fields else None

    taps = {name: all_gather(t) for name, t in (output.taps or {}).items() if f"{LAYER}{name}" in fields}
    codes = None
    if output.codes is not None and "codes" in fields:
        codes = (all_gather(output.codes[0]), all_gather(output.codes[1]))
    return Output(maps("maps"), maps("preacts"), rows("pooled"), rows("embedding"), rows("logits"), taps or None, codes)


def gathered_batch(batch: Batch) -> Batch:
    """Labels, indices and views of all processes; no images, of which ``images`` keeps the shape."""
    views = None if batch.views is None else all_gather(batch.views)
    return Batch(batch.images[:0], all_gather(batch.labels), all_gather(batch.indices), views)


def detached(output: Output) -> Output:
    """The same output as a constant."""

    def several(field: Any) -> Any:
        return field.detach() if isinstance(field, GatheredMaps) else field and tuple(t.detach() for t in field)

    pooled, embedding, logits = (
        t if t is None else t.detach() for t in (output.pooled, output.embedding, output.logits)
    )
    taps = output.taps and {key: t.detach() for key, t in output.taps.items()}
    codes = output.codes and (output.codes[0].detach(), output.codes[1].detach())
    return Output(several(output.maps), several(output.preacts), pooled, embedding, logits, taps, codes)
