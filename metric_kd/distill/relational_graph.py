"""What an instance relationship graph is drawn over: which layers of the two networks, and in which shape."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from metric_kd.distances import Pairwise, at_least_float32
from metric_kd.distill.layers import MapPair, pool_to_smaller
from metric_kd.errors import UserError, one_of
from metric_kd.types import Output

Layer = int | Literal["embedding"]
"""A stage number of ``Output.maps`` (0 is the stem, -1 the last), or the embedding."""
Step = tuple[Layer, Layer]
"""An earlier and a later layer of one network."""


Item = TypeVar("Item", Layer, Step)
REDUCTIONS = ("mean", "sum", "caffe")
MODES = ("one_to_one", "one_to_all", "all_to_all")


class Preset(NamedTuple):
    """What the options of term ``irg`` are where the user does not say."""

    vertex: float
    edge: float
    transformation: float
    mode: str
    layers: tuple[Layer, ...]
    steps: tuple[Step, ...]
    feature: str
    reduction: str
    caffe: bool = False


_STAGES: tuple[Step, ...] = ((-4, -3), (-3, -2), (-2, -1))
"""The last three stages: from what enters a stage to what leaves it."""

PRESETS = {
    "zoo": Preset(0.1, 5.0, 5.0, "one_to_one", (-2, -1, "embedding"), ((-2, -1),), "flat", "mean"),
    "paper": Preset(1e-4, 1e-4, 0.01, "one_to_all", (-3, -2, -1), _STAGES, "pooled", "sum"),
    "caffe": Preset(0.0, 0.005, 0.0, "one_to_one", (-1,), _STAGES, "pooled", "caffe", caffe=True),
    "caffe_transformation": Preset(0.0, 0.0, 0.005, "one_to_one", (-1,), _STAGES, "pooled", "caffe", caffe=True),
}


class Usual(float):
    """A default weight: told apart from the same number given by the user, so that a preset may replace it."""


VERTEX, EDGE, TRANSFORMATION = (Usual(weight) for weight in PRESETS["zoo"][:3])


def given_or(preset: float, option: str, weight: float) -> float:
    """The weight that the user gave, else the preset's; ``UserError`` unless it is finite and not negative."""
    weight = preset if isinstance(weight, Usual) else float(weight)
    if not 0 <= weight < float("inf"):
        raise UserError(f"irg needs weights of 0 or more; {option} is {weight:g}.")
    return weight


def chosen(option: str, value: str, known: Sequence[str]) -> str:
    """The value; ``UserError`` with a suggestion where it is none of the known ones."""
    if value not in known:
        raise one_of(f"{option} of irg:", value, list(known))
    return value


def pair_layers(mode: str, student: str, teacher: str, usual: tuple[Layer, ...]) -> list[tuple[Layer, Layer]]:
    """(student's, teacher's) layers whose edges are compared. Raises ``UserError`` for lists that do not fit the mode."""
    ours, theirs = parse_nodes("student_layers", student), parse_nodes("teacher_layers", teacher)
    if chosen("mode", mode, MODES) == "one_to_all":
        ours, theirs = ours or usual, theirs or (-1,)
        if len(theirs) != 1:
            raise UserError(f"irg's one_to_all takes one layer of the teacher, not {teacher!r}; name one.")
        return [(layer, theirs[0]) for layer in ours]
    ours, theirs = ours or theirs or usual, theirs or ours or usual
    if mode == "all_to_all":
        return [(s, t) for s in ours for t in theirs]
    return _in_order("student_layers", ours, theirs)


def pair_steps(student: str, teacher: str, usual: tuple[Step, ...]) -> list[tuple[Step, Step]]:
    """(student's, teacher's) pairs of layers between which transformations are compared, in the order of the lists."""
    ours = parse_steps("transformation_layers", student)
    theirs = parse_steps("teacher_transformation_layers", teacher)
    return _in_order("transformation_layers", ours or theirs or usual, theirs or ours or usual)


def _in_order(option: str, ours: tuple[Item, ...], theirs: tuple[Item, ...]) -> list[tuple[Item, Item]]:
    if len(ours) != len(theirs):
        raise UserError(
            f"irg pairs {option} with the teacher's in order, but there are {len(ours)} and {len(theirs)}; "
            "name as many on both sides."
        )
    return list(zip(ours, theirs, strict=True))


def parse_nodes(option: str, text: str) -> tuple[Layer, ...]:
    """``"2/3/embedding"`` as (2, 3, "embedding"); the empty string as ()."""
    return tuple(_layer(option, part) for part in text.split("/")) if text.strip() else ()


def parse_steps(option: str, text: str) -> tuple[Step, ...]:
    """``"1-2/2-3"`` as ((1, 2), (2, 3)); the empty string as ()."""
    steps: list[Step] = []
    for part in text.split("/") if text.strip() else ():
        earlier, dash, later = part.partition("-")
        if not dash:
            raise UserError(f"{option}={text!r} names no pairs of layers; write them as in {option}=1-2/2-3.")
        steps.append((_layer(option, earlier), _layer(option, later)))
    return tuple(steps)


def _layer(option: str, text: str) -> Layer:
    text = text.strip()
    if text == "embedding":
        return "embedding"
    if text.isdecimal():
        return int(text)
    raise UserError(f"{option} names layer {text!r}; write stage numbers or embedding, with slashes between them.")


def fields_of(layers: Iterable[Layer]) -> set[str]:
    """The fields of ``Output`` that hold these layers."""
    return {"embedding" if layer == "embedding" else "maps" for layer in layers}


def node(owner: str, output: Output, layer: Layer, pooled: bool) -> Tensor:
    """The feature of one layer, (N, C, H, W) or (N, D); maps averaged over the grid to (N, C) where ``pooled``.

    Raises ``UserError`` where the network (``owner`` in words) has no such layer.
    """
    if layer == "embedding":
        if output.embedding is None:
            raise UserError(f"irg reads the embedding, which the {owner} does not give; name stages instead.")
        return output.embedding
    count = len(output.maps or ())
    if not output.maps or not -count <= layer < count:
        given = f"has maps 0 to {count - 1}" if count else "gives no maps"
        wanted = (
            f"stage {layer}" if layer >= 0 else f"the last stage but {-layer - 1}" if layer < -1 else "the last stage"
        )
        raise UserError(f"irg reads {wanted}, but the {owner} {given}; name other layers, or embedding.")
    features = output.maps[layer]
    return at_least_float32(features).mean((2, 3)) if pooled else features


def rows_of(features: Tensor | Pairwise) -> Pairwise:
    """Distances between the images, whatever the shape of their features; those of (N, D) rows are shared."""
    if isinstance(features, Tensor) and features.ndim > 2:
        return Pairwise(features.flatten(1))
    return Pairwise.of(features)


def matched(earlier: Tensor, later: Tensor) -> MapPair:
    """Two layers of one network in one shape, in at least float32: what a transformation subtracts.

    Each (N, C, H, W) or (N, D). The larger grid is averaged down to the smaller one, to a single position beside rows;
    of the wider layer groups of adjacent channels are averaged to the narrower width. Raises ``UserError`` where the
    widths are no multiples.
    """
    for features in (earlier, later):
        if features.ndim not in (2, 4) or len(features) != len(earlier):
            raise UserError(
                "a transformation needs two layers of one batch, maps (N, C, H, W) or rows (N, D); "
                f"got {tuple(earlier.shape)} and {tuple(later.shape)}."
            )
    earlier, later = at_least_float32(earlier), at_least_float32(later)
    if earlier.ndim == later.ndim == 4:
        earlier, later = pool_to_smaller(earlier, later)
    else:
        earlier, later = (f.mean((2, 3)) if f.ndim == 4 else f for f in (earlier, later))
    narrow, wide = sorted((earlier.shape[1], later.shape[1]))
    if wide % narrow:
        raise UserError(
            f"a transformation between {earlier.shape[1]} and {later.shape[1]} channels has no common width; choose "
            "other transformation_layers, or transformation=0."
        )
    return _narrowed(earlier, narrow), _narrowed(later, narrow)


def _narrowed(features: Tensor, width: int) -> Tensor:
    if features.shape[1] == width:
        return features
    return features.unflatten(1, (width, -1)).mean(2)
