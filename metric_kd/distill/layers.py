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


def paired_maps(student: Output, teacher: Output | None, layers: tuple[int, ...]) -> list[MapPair]:
    """(student map, teacher map) of the given stages; of the last three of each network where none are given.

    Raises ``UserError`` where a network gives no maps or has no such stage.
    """
    if not student.maps or teacher is None or not teacher.maps:
        owner = "teacher" if student.maps else "student"
        raise UserError(f"the {owner} gives no stage maps; choose a convolutional {owner} or another method.")
    if not layers:
        count = min(3, len(student.maps), len(teacher.maps))
        return list(zip(student.maps[-count:], teacher.maps[-count:], strict=True))
    for owner, maps in (("student", student.maps), ("teacher", teacher.maps)):
        if max(layers) >= len(maps):
            raise UserError(
                f"layers names stage {max(layers)}, but the {owner} has maps 0 to {len(maps) - 1}; choose from those."
            )
    return [(student.maps[layer], teacher.maps[layer]) for layer in layers]


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
