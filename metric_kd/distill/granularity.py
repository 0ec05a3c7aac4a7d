"""Multi-granularity distillation: a pooled feature summed up in few numbers and in many, and networks that compare both.

A coder sums up the pooled feature of a network in a short code; its decoder says from the code what the network says.
The abstract code is short and the detailed one long. The teacher's coders are fitted once
(:mod:`metric_kd.engine.coding`); the student learns to give the same codes (MAG), and may learn from the average of the
teacher's and both decoders' logits, a steadier target (MAS).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.distances import at_least_float32, full_precision
from metric_kd.distill.logit.st import st
from metric_kd.errors import UserError, one_of
from metric_kd.losses.cross_entropy import cross_entropy
from metric_kd.losses.term import TERMS, Term
from metric_kd.models.network import Network
from metric_kd.types import Batch, Output

ABSTRACT, DETAILED = 64, 256
"""Lengths of the two codes."""
TEMPERATURES = (2.0, 8.0)
"""At which codes and decoded logits are softened: of the abstract branch, of the detailed one."""
BRANCHES = ("abstract", "detailed")

Codes = tuple[Tensor, Tensor]
"""(abstract, detailed): (N, a) and (N, d)."""


def granularity(
    student: Codes,
    teacher: Codes,
    abstract: float = 1.0,
    detailed: float = 1.0,
    elementwise: bool = False,
) -> Tensor:
    """abstract L(2) + detailed L(8), L(T) = T^2 mean_n KL(softmax(t_n / T) || softmax(s_n / T)) of the codes s and t.

    student, teacher: (abstract, detailed) codes, (N, a) and (N, d), of both networks; the softmax runs over the entries
    of a code. abstract, detailed: weights. Half types are raised to float32; no gradient reaches the teacher. Raises
    ``UserError`` where the lengths of the codes differ.

    Shao, Chen: Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681. ``elementwise``: the mean over the
    entries of the codes as well, which the paper's program takes between peers; it divides the parts by a and d.
    """
    total = at_least_float32(student[0]).sum() * 0.0
    for ours, theirs, temperature, weight in zip(student, teacher, TEMPERATURES, (abstract, detailed), strict=True):
        if ours.shape != theirs.shape or ours.ndim != 2:
            raise UserError(
                f"granularity compares codes of one length; got {tuple(ours.shape)} and {tuple(theirs.shape)}: fit the "
                "teacher's coders with the dimensions that the student uses."
            )
        if weight != 0:
            part = weight * st(ours, theirs, temperature)
            total = total + (part / ours.shape[1] if elementwise else part)
    return total


def stable_logits(logits: Tensor, abstract: Tensor, detailed: Tensor) -> Tensor:
    """(z + y_a + y_d) / 3: the stable target of MAS, from (N, K) logits of the teacher and of its two decoders.

    Shao, Chen: Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681.
    """
    return (logits + abstract + detailed) / 3


def decoded_logits(decoded: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 mean_n KL(softmax(z_n / T) || softmax(y_n / T)) + CE(y, labels): what fits one branch of the teacher's coders.

    decoded, teacher: y and z, (N, K) logits of the decoder and of the teacher, which gets no gradient; labels (N,).

    Shao, Chen: Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681.
    """
    return st(decoded, teacher, temperature) + cross_entropy(decoded, labels)


def decoded_embedding(decoded: Tensor, teacher: Tensor) -> Tensor:
    """mean_n |y_n - t_n|^2 / mean_n |t_n|^2: the same for a teacher without classes; it gets no gradient.

    decoded, teacher: y and t, (N, D) embeddings. For embeddings of length 1 this is the mean squared gap. Ours: the paper
    has classifiers only.
    """
    with full_precision(decoded):
        decoded = at_least_float32(decoded)
        target = teacher.detach().to(decoded)
        size = target.square().sum()
        return (decoded - target).square().sum() / torch.where(size > 0, size, torch.ones_like(size))


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, Linear, with torch's own initialisation."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Encoders(nn.Module):
    """(N, F) pooled features to their codes, (N, ``abstract``) and (N, ``detailed``), in at least float32."""

    def __init__(self, pooled: int, abstract: int = ABSTRACT, detailed: int = DETAILED):
        super().__init__()
        self.abstract = two_layers(pooled, pooled, abstract)
        self.detailed = two_layers(pooled, pooled, detailed)

    def forward(self, pooled: Tensor) -> Codes:
        with full_precision(pooled):
            pooled = at_least_float32(pooled)
            return self.abstract(pooled), self.detailed(pooled)


class Decoders(nn.Module):
    """Codes to what the network said: two (N, K) tensors."""

    def __init__(self, pooled: int, outputs: int, abstract: int = ABSTRACT, detailed: int = DETAILED):
        super().__init__()
        self.abstract = two_layers(abstract, pooled, outputs)
        self.detailed = two_layers(detailed, pooled, outputs)

    def forward(self, codes: Codes) -> Codes:
        with full_precision(codes[0]):
            return self.abstract(codes[0]), self.detailed(codes[1])


@dataclass(frozen=True)
class CodersSpec:
    """All that is needed to build a teacher's coders again, and to know the teacher.

    pooled: width of the feature; outputs: width of what is decoded, "logits" or "embedding"; abstract, detailed: lengths
    of the codes; teacher: digest of the weights to which they were fitted.
    """

    pooled: int
    outputs: int
    decodes: str = "logits"
    abstract: int = ABSTRACT
    detailed: int = DETAILED
    teacher: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Strings and numbers only."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "CodersSpec":
        """The inverse of :meth:`to_dict`; raises ``UserError`` for a key it does not know and for what cannot be."""
        known = [field.name for field in fields(cls)]
        for key in plain:
            if key not in known:
                raise one_of("entry of a description of coders", key, known)
        spec = cls(**plain)
        if spec.decodes not in ("logits", "embedding"):
            raise one_of("output of coders", spec.decodes, ["logits", "embedding"])
        for key in ("pooled", "outputs", "abstract", "detailed"):
            if getattr(spec, key) < 1:
                raise UserError(f"coders with {key} {getattr(spec, key)} are not possible; choose 1 or more.")
        return spec


class Coders(nn.Module):
    """Both encoders and both decoders of one teacher."""

    role = "coders"
    """Under this name a checkpoint holds the description; :class:`Network` is a "network"."""

    def __init__(self, spec: CodersSpec):
        super().__init__()
        self.spec = spec
        self.encoders = Encoders(spec.pooled, spec.abstract, spec.detailed)
        self.decoders = Decoders(spec.pooled, spec.outputs, spec.abstract, spec.detailed)

    def forward(self, pooled: Tensor) -> Codes:
        """What both decoders make of (N, F) pooled features."""
        decoded: Codes = self.decoders(self.encoders(pooled))
        return decoded


class CodedTeacher(nn.Module):
    """A frozen teacher that also gives ``codes``; with ``stable``, its logits are :func:`stable_logits`.

    Used wherever a :class:`Network` is: it has the teacher's spec, sizes and everything that it provides. Raises
    ``UserError`` where the coders do not fit, or where there are no logits to be made stable.
    """

    def __init__(self, network: Network, coders: Coders, stable: bool = False):
        super().__init__()
        if coders.spec.pooled != network.pooled_size:
            raise UserError(
                f"the coders read {coders.spec.pooled} features and the teacher gives {network.pooled_size}; fit them to "
                "this teacher with `metric-kd granularity`."
            )
        if stable and not ("logits" in network.provides and coders.spec.decodes == "logits"):
            raise UserError(
                "the stable target of mas is an average of logits, which this teacher and its coders do not give; use "
                "--granularity mag."
            )
        self.network, self.coders, self.stable = network, coders, stable
        self.spec = network.spec
        self.pooled_size, self.embedding_size = network.pooled_size, network.embedding_size
        self.provides = network.provides | {"codes"}
        self.eval().requires_grad_(False)

    @property
    def rgb_scale(self) -> Tensor:
        return self.network.rgb_scale

    def forward(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        """As :class:`Network`, with ``codes`` where they are wanted."""
        steadied = self.stable and "logits" in want
        asked = set(want) - {"codes"} | ({"pooled"} if steadied or "codes" in want else set())
        output: Output = self.network(images, want=tuple(sorted(asked)))
        if output.pooled is not None and (steadied or "codes" in want):
            codes = self.coders.encoders(output.pooled)
            if steadied:
                assert output.logits is not None
                output = output._replace(logits=stable_logits(output.logits, *self.coders.decoders(codes)))
            output = output._replace(codes=codes if "codes" in want else None)
        return output if "pooled" in want else output._replace(pooled=None)


@TERMS.register("granularity")
class Granularity(Term):
    """:func:`granularity` of the teacher's codes and of those that encoders of the term make of the student's feature;
    default weight 1, as in the paper's program.

    Shao, Chen: Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681.

    abstract, detailed: weights of the two parts; ``elementwise``: the mean of the paper's program between peers. Outputs
    that carry codes (of peers, which have one pair of encoders each) are compared as they are.
    """

    needs = ("pooled",)
    teacher_needs = ("codes",)
    reads_teacher = True
    hint = "fit the teacher's coders with `metric-kd granularity` and give --granularity mag --granularity_load FILE"
    family = "feature"
    cost = "N F^2"
    default_weight = 1.0
    paper = "Multi-granularity for knowledge distillation, 2021, arXiv 2108.06681"

    def __init__(self, abstract: float = 1.0, detailed: float = 1.0, elementwise: bool = False):
        super().__init__()
        self.abstract, self.detailed, self.elementwise = abstract, detailed, elementwise
        self.encoders: Encoders | None = None

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        theirs = _codes_of(teacher)
        if student.codes is None:
            assert student.pooled is not None
            width = student.pooled.shape[1]
            self.encoders = Encoders(width, *(code.shape[1] for code in theirs)).to(student.pooled.device)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        ours = student.codes
        if ours is None:
            if self.encoders is None or student.pooled is None:
                raise UserError("granularity has no encoders; call build(student, teacher, num_classes) first.")
            ours = self.encoders(student.pooled)
        return granularity(ours, _codes_of(teacher), self.abstract, self.detailed, self.elementwise)


def _codes_of(teacher: Output | None) -> Codes:
    if teacher is None or teacher.codes is None:
        raise UserError(
            "granularity compares codes, which the teacher does not give; fit its coders with `metric-kd granularity` and "
            "give --granularity mag --granularity_load FILE."
        )
    return teacher.codes
