"""Which stage maps of two networks a method compares, and how their grids are made equal."""

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from metric_kd.errors import UserError
from metric_kd.types import Output

MapPair = tuple[Tensor, Tensor]


def parse_layers(layers: str) -> tuple[int, ...]:
    """``"2/3/4"`` as (2, 3, 4), indices into ``Output.maps`` (0 is the stem); the empty string as ()."""
    if not layers.strip():
        return ()
    parts = layers.split("/")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"layers={layers!r} is no list of stage numbers; write them with slashes, as in layers=2/3/4.")
    return tuple(int(part) for part in parts)


def paired_maps(student: Output, teacher: Output | None, layers: tuple[int, ...], count: int = 3) -> list[MapPair]:
    """(student map, teacher map) of the given stages; of the last ``count`` of each network where none are given.

    Raises ``UserError`` where a network gives no maps or has no such stage.
    """
    return _paired(student.maps, None if teacher is None else teacher.maps, layers, count, "stage maps")


def paired_preacts(student: Output, teacher: Output | None, layers: tuple[int, ...], count: int = 3) -> list[MapPair]:
    """As :func:`paired_maps`, of the maps before their activation."""
    return _paired(student.preacts, None if teacher is None else teacher.preacts, layers, count, "pre-activations")


def _paired(
    ours: tuple[Tensor, ...] | None, theirs: tuple[Tensor, ...] | None, layers: tuple[int, ...], count: int, what: str
) -> list[MapPair]:
    if not ours or not theirs:
        owner = "teacher" if ours else "student"
        raise UserError(f"the {owner} gives no {what}; choose a convolutional {owner} or another method.")
    if not layers:
        count = min(count, len(ours), len(theirs))
        return list(zip(ours[-count:], theirs[-count:], strict=True))
    for owner, maps in (("student", ours), ("teacher", theirs)):
        if max(layers) >= len(maps):
            raise UserError(
                f"layers names stage {max(layers)}, but the {owner} has maps 0 to {len(maps) - 1}; choose from those."
            )
    return [(ours[layer], theirs[layer]) for layer in layers]


def pool_to_smaller(student: Tensor, teacher: Tensor) -> MapPair:
    """Two (N, C, H, W) maps, any channels, averaged down to the smaller height and width of the two."""
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise UserError(
            "feature maps must be (N, C, H, W) with the same N for student and teacher; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _pool(student, size), _pool(teacher, size)


def _pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = maps.shape[2:]
    if (height, width) == size:
        return maps
    if height % size[0] == 0 and width % size[1] == 0:  # the same average; unlike the general one deterministic on CUDA
        return avg_pool2d(maps, (height // size[0], width // size[1]))
    return adaptive_avg_pool2d(maps, size)


def same_shape(method: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse two maps that a method cannot compare element by element."""
    if student.shape != teacher.shape or student.ndim != 4:
        raise UserError(
            f"{method} compares two (N, C, H, W) maps of one shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: pool and connect the student's first, as --loss {method} does."
        )
