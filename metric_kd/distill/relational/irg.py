"""Instance relationship graphs: the student keeps instances, distances between them, and how layers move them."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from metric_kd.distances import COINCIDENT, Pairwise, at_least_float32, full_precision, paired
from metric_kd.distill.layers import MapPair
from metric_kd.distill.relational_graph import (
    EDGE,
    PRESETS,
    REDUCTIONS,
    TRANSFORMATION,
    VERTEX,
    Step,
    chosen,
    fields_of,
    given_or,
    matched,
    node,
    pair_layers,
    pair_steps,
    rows_of,
)
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Term
from metric_kd.types import Batch, Output


def irg_vertex(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared gap between the instances themselves, in a layer where both networks have one width.

    loss = sum over i of |f(student)_i - f(teacher)_i|^2 for ``reduction="sum"`` (the paper's), over N K for ``mean``
    (the KD Zoo's), over 2 N for ``caffe`` (that of EuclideanLoss).

    Both (N, K), logits or embeddings; other shapes raise ``UserError``. Half types are raised to float32; no gradient
    reaches the teacher.

    Liu et al.: Knowledge Distillation via Instance Relationship Graph, 2019, doi 10.1109/CVPR.2019.00726.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise UserError(
            f"irg_vertex compares (N, K) rows of one width; got {tuple(student.shape)} and {tuple(teacher.shape)}: "
            "use vertex=0 or give both networks one width."
        )
    with full_precision(student):
        student = at_least_float32(student)
        return _reduced(student - teacher.detach().to(student), reduction, len(student))


def irg_edge(
    student: Tensor | Pairwise,
    teacher: Tensor | Pairwise,
    *,
    normalise: bool = True,
    detach_max: bool = False,
    reduction: str = "mean",
    caffe: bool = False,
) -> Tensor:
    """Squared gap between the squared distances of all pairs of images, each network's over its largest.

    A_ij = |x_i - x_j|^2, D = A / max A; loss = sum over N^2 of (D(student) - D(teacher))^2 for ``reduction="sum"``
    (the paper's), over N^2 for ``mean`` (the KD Zoo's), over 2 N for ``caffe``. ``normalise=False`` compares A (the
    paper's formula); ``detach_max`` takes the maximum for a constant; ``caffe`` gives the gradient of the authors'
    code, see :func:`graph_edges`.

    student (N, ...), teacher (N, ...): rows or maps of any shape, flattened; half types are raised to float32; no
    gradient reaches the teacher. Coincident rows give no gradient. N < 2, and a normalised graph all of whose rows
    coincide, give 0 without gradient.

    Liu et al.: Knowledge Distillation via Instance Relationship Graph, 2019, doi 10.1109/CVPR.2019.00726. Deviation:
    the paper has no maximum, its code has; the Zoo's gradient goes through the maximum, the authors' does not.
    """
    student, teacher = paired(rows_of(student), rows_of(teacher))
    with full_precision(student.x):
        ours = graph_edges(student, normalise=normalise, detach_max=detach_max, caffe=caffe)
        theirs = graph_edges(teacher, normalise=normalise).detach().to(ours)
        return _reduced(_gap(ours, theirs, normalise), reduction, len(student))


def irg_transformation(
    student_pair: MapPair,
    teacher_pair: MapPair,
    *,
    normalise: bool = True,
    detach_max: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Squared gap between how far two layers move each image, each network's lengths over its largest.

    v_i = |f_later(x_i) - f_earlier(x_i)|^2, V = v / max v; loss = sum over N of (V(student) - V(teacher))^2 for
    ``reduction="sum"`` (the paper's), over N for ``mean`` (the KD Zoo's), over 2 for ``caffe``. ``normalise=False``
    compares v (the paper's formula); ``detach_max`` takes the maximum for a constant (the authors' gradient).

    Each pair (earlier, later) of one network: maps (N, C, H, W) or rows (N, D), brought to one grid and width by
    averaging (:func:`~metric_kd.distill.relational_graph.matched`); ``UserError`` where that cannot be. Half types are
    raised to float32; no gradient reaches the teacher. Normalised, N = 1 and layers that move no image give 0 without
    gradient.

    Liu et al.: Knowledge Distillation via Instance Relationship Graph, 2019, doi 10.1109/CVPR.2019.00726: the vertex
    part of the transformation, which the paper keeps. Deviation: the paper has no maximum, its code has; averaging
    over channels as in the Zoo, for any factor.
    """
    if len(student_pair[0]) != len(teacher_pair[0]):
        raise UserError(
            f"student and teacher must see the same images; got {len(student_pair[0])} and {len(teacher_pair[0])}."
        )
    with full_precision(student_pair[0]):
        ours = _over_maximum(_moved(student_pair), normalise, detach_max)
        theirs = _over_maximum(_moved(teacher_pair).detach(), normalise, True).to(ours)
        return _reduced(_gap(ours, theirs, normalise), reduction, 1)


def graph_edges(x: Pairwise, *, normalise: bool = True, detach_max: bool = False, caffe: bool = False) -> Tensor:
    """(N, N) squared distances over their maximum; zeros where all rows coincide.

    ``caffe``: the authors' gradient dx_n = sum_m (2 / M) g_nm (x_n - x_m), M the maximum. It forgets that x_n is a
    column too: for a symmetric upstream gradient g it is half of the true one for constant M.
    """
    squared = x.squared
    if caffe and squared.requires_grad:
        squared = _CaffeSquared.apply(x.x, squared.detach())  # type: ignore[no-untyped-call]
    return _over_maximum(squared, normalise, detach_max or caffe)


class _CaffeSquared(torch.autograd.Function):
    """The squared distances that are given, with the authors' gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, squared: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return squared.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with full_precision(x):
            rows = x.double() - x.double().mean(0, keepdim=True)  # as the distances: centred, in float64
            upstream = grads[0].double()
            return (2 * (upstream.sum(1, keepdim=True) * rows - upstream @ rows)).to(x.dtype), None


def _moved(pair: MapPair) -> Tensor:
    earlier, later = matched(*pair)
    return (later - earlier).flatten(1).square().sum(1)


def _over_maximum(values: Tensor, normalise: bool, detach_max: bool) -> Tensor:
    """values / max; zeros without gradient where the maximum is that of coincident rows. NaN stays NaN."""
    if not normalise:
        return values
    largest = (values.detach() if detach_max else values).amax()
    void = largest.detach() <= COINCIDENT
    return (values / largest.masked_fill(void, 1.0)).masked_fill(void, 0.0)


def _gap(ours: Tensor, theirs: Tensor, normalised: bool) -> Tensor:
    """ours - theirs; nothing where one of the two has no maximum, which then is 0 and not 1."""
    gap = ours - theirs
    if not normalised:
        return gap
    return gap.masked_fill((ours.detach().amax() == 0) | (theirs.amax() == 0), 0.0)


def _reduced(gap: Tensor, reduction: str, caffe_count: int) -> Tensor:
    """caffe_count: what Caffe takes for the number of items, the leading dimension of its blob."""
    chosen("reduction", reduction, REDUCTIONS)
    squared = gap.square()
    if reduction == "mean":
        return squared.mean()
    return squared.sum() if reduction == "sum" else squared.sum() / (2 * caffe_count)


@TERMS.register("irg")
class IRG(Term):
    """vertex * :func:`irg_vertex` + edge * :func:`irg_edge` + transformation * :func:`irg_transformation`.

    A part of weight 0 reads and costs nothing. ``vertex_on``: ``logits`` or ``embedding``. Edges: ``student_layers``,
    ``teacher_layers``, as in ``2/3/embedding`` (stages of ``Output.maps``). Transformations: ``transformation_layers``,
    ``teacher_transformation_layers``, as in ``1-2/2-3``, compared in that order. A list holds for the other network
    too, unless that has its own. ``feature`` of a map: ``flat`` or ``pooled`` (cheaper). ``reduction``, ``normalise``,
    ``detach_max``, ``caffe``: see the functions; ``caffe`` also means the reduction, unless that is given.

    ``mode``, of the edges: ``one_to_one``, layers in the order of the lists, averaged where the reduction is ``mean``
    (as in the Zoo), else summed; ``one_to_all``, one layer of the teacher (its last stage) for each of the student's,
    summed; ``all_to_all``, the sum over all pairs (not in the paper). Transformations are always one to one.

    ``preset``, overridden by what is given beside it (of a switch only ``true`` is seen):
    ``zoo``, the default: one_to_one over the last two stages and the embedding, and the step between the two; flat.
    ``paper``: one_to_all on the student's last three stages, and the steps through them; pooled, sums. Its lambdas are
    not published: 1e-4, 1e-4 and 0.01 are about the Zoo's weights, as sums over 128 images and 10 classes. Its formula
    has no maximum (``normalise=false``), its code has.
    ``caffe``: the shipped IRG net, 0.005 times the edges of the last stage. ``caffe_transformation``: the other one,
    0.005 times the steps through the last three stages; there from the first block of a stage to its last, here from
    what enters a stage to what leaves it, since maps are those of whole stages.

    Raises ``UserError`` for options out of range, layers that do not exist and widths that cannot be matched.

    Default weight 1, the KD Zoo's.
    """

    needs: ClassVar[tuple[str, ...]] = ("maps", "embedding", "logits")
    hint = "write irg:1,vertex=0 or irg:1,vertex_on=embedding"
    reads_teacher = True
    relates = True
    family = "relational"
    cost = "N^2 D"
    default_weight = 1.0
    paper = "Knowledge Distillation via Instance Relationship Graph, 2019, doi 10.1109/CVPR.2019.00726"

    def __init__(
        self,
        vertex: float = VERTEX,
        edge: float = EDGE,
        transformation: float = TRANSFORMATION,
        mode: str = "",
        student_layers: str = "",
        teacher_layers: str = "",
        transformation_layers: str = "",
        teacher_transformation_layers: str = "",
        vertex_on: str = "logits",
        feature: str = "",
        reduction: str = "",
        normalise: bool = True,
        detach_max: bool = False,
        caffe: bool = False,
        preset: str = "",
    ):
        super().__init__()
        usual = PRESETS[chosen("preset", preset or "zoo", list(PRESETS))]
        self.vertex = given_or(usual.vertex, "vertex", vertex)
        self.edge = given_or(usual.edge, "edge", edge)
        self.transformation = given_or(usual.transformation, "transformation", transformation)
        if not self.vertex + self.edge + self.transformation:
            raise UserError("irg compares nothing; give vertex, edge or transformation a weight above 0.")
        self.vertex_on = chosen("vertex_on", vertex_on, ["logits", "embedding"])
        self.pooled = chosen("feature", feature or usual.feature, ["flat", "pooled"]) == "pooled"
        self.caffe = caffe or usual.caffe
        reduction = reduction or ("caffe" if self.caffe else usual.reduction)
        self.reduction = chosen("reduction", reduction, REDUCTIONS)
        self.normalise, self.detach_max = normalise, detach_max or self.caffe
        self.mode = mode or usual.mode
        self.layer_pairs = pair_layers(self.mode, student_layers, teacher_layers, usual.layers)
        self.step_pairs = pair_steps(transformation_layers, teacher_transformation_layers, usual.steps)
        self.needs = self._needs()  # type: ignore[misc]  # options narrow what the class declares

    def _needs(self) -> tuple[str, ...]:
        read = {self.vertex_on} if self.vertex else set()
        if self.edge:
            read |= fields_of(layer for pair in self.layer_pairs for layer in pair)
        if self.transformation:
            read |= fields_of(layer for pair in self.step_pairs for step in pair for layer in step)
        return tuple(sorted(read))

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        with torch.no_grad():
            self._compared(student, teacher)  # refuses whatever cannot be compared

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        return self._compared(student, teacher)

    def _compared(self, student: Output, teacher: Output | None) -> Tensor:
        assert teacher is not None
        parts = []
        if self.vertex:
            parts.append(self.vertex * self._vertices(student, teacher))
        if self.edge:
            parts.append(self.edge * self._edges(student, teacher))
        if self.transformation:
            parts.append(self.transformation * self._transformations(student, teacher))
        return torch.stack(parts).sum()

    def _vertices(self, student: Output, teacher: Output) -> Tensor:
        ours, theirs = getattr(student, self.vertex_on), getattr(teacher, self.vertex_on)
        if ours is None or theirs is None:
            raise UserError(f"irg found no {self.vertex_on} in both networks; switch that part off with vertex=0.")
        return irg_vertex(ours, theirs, reduction=self.reduction)

    def _edges(self, student: Output, teacher: Output) -> Tensor:
        ours = {s: rows_of(node("student", student, s, self.pooled)) for s in {s for s, _ in self.layer_pairs}}
        theirs = {t: rows_of(node("teacher", teacher, t, self.pooled)) for t in {t for _, t in self.layer_pairs}}
        gap = partial(
            irg_edge, normalise=self.normalise, detach_max=self.detach_max, reduction=self.reduction, caffe=self.caffe
        )
        return self._over_layers([gap(ours[s], theirs[t]) for s, t in self.layer_pairs], self.mode == "one_to_one")

    def _transformations(self, student: Output, teacher: Output) -> Tensor:
        def pair(owner: str, output: Output, step: Step) -> MapPair:
            return node(owner, output, step[0], self.pooled), node(owner, output, step[1], self.pooled)

        gap = partial(
            irg_transformation, normalise=self.normalise, detach_max=self.detach_max, reduction=self.reduction
        )
        gaps = [gap(pair("student", student, s), pair("teacher", teacher, t)) for s, t in self.step_pairs]
        return self._over_layers(gaps, averaged=True)

    def _over_layers(self, gaps: list[Tensor], averaged: bool) -> Tensor:
        total = torch.stack(gaps)
        return total.mean() if averaged and self.reduction == "mean" else total.sum()
