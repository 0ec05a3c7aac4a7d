"""Fitting the coders of a frozen teacher: the second of the stages of multi-granularity distillation."""

from pathlib import Path

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.distill.granularity import (
    BRANCHES,
    TEMPERATURES,
    CodedTeacher,
    Coders,
    CodersSpec,
    decoded_embedding,
    decoded_logits,
)
from metric_kd.distributed import all_gather
from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.engine.tasks import ParameterGroup, Task, trainable
from metric_kd.errors import UserError
from metric_kd.models.network import Network, load_weights
from metric_kd.types import Batch, Output


def coders_for(teacher: Network, decodes: str, abstract: int, detailed: int) -> Coders:
    """Coders with random weights (torch's global generator) that fit a teacher; ``decodes``: "logits" or "embedding".

    Raises ``UserError`` where the teacher does not give what is to be decoded.
    """
    if decodes == "logits" and teacher.spec.num_classes is None:
        raise UserError(
            "the teacher tells no classes apart, so its decoders cannot give logits; give --task embedding, and they give "
            "its embedding."
        )
    outputs = teacher.spec.num_classes if decodes == "logits" else teacher.embedding_size
    assert outputs is not None
    digest = weights_digest(teacher)
    return Coders(CodersSpec(teacher.pooled_size, outputs, decodes, abstract, detailed, digest))


class Coding(Task):
    """Both branches of a teacher's coders, fitted in one pass: sum of :func:`decoded_logits` of the branches, at
    temperatures 2 and 8, or of :func:`decoded_embedding` where the coders decode embeddings.

    The teacher is in eval mode, runs without gradients, and is neither trained nor saved. The branches share nothing, so
    one optimiser steps as two would.
    """

    student: Coders

    def __init__(self, coders: Coders, teacher: Network, precision: str = "fp32"):
        super().__init__()
        self.student = coders
        self.precision = precision
        self.loss_names = list(BRANCHES)
        self._frozen = (teacher.eval().requires_grad_(False),)  # in a tuple: not a submodule

    def build(self, example: Batch, num_classes: int, labels: Tensor | None = None) -> None:
        """Nothing is left to build; what does not fit fails here, before any training."""
        with torch.no_grad():
            self(example)

    def parameter_groups(self) -> list[ParameterGroup]:
        """All coders, in one group."""
        return [ParameterGroup(params=trainable(self.student.parameters()))]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        field = self.student.spec.decodes
        with torch.no_grad(), autocast(batch.images.device, self.precision):
            output = self.running(self._frozen[0])(batch.images, want=("pooled", field))
        target = getattr(output, field)
        values: dict[str, Tensor] = {}
        for name, decoded, temperature in zip(BRANCHES, self.student(output.pooled), TEMPERATURES, strict=True):
            if field == "logits":
                values[name] = decoded_logits(decoded, target, batch.labels, temperature)
            else:
                # Divided by the target's size in the batch, and so no mean over samples: all processes' are one batch.
                values[name] = decoded_embedding(all_gather(decoded), all_gather(target))
        return torch.stack(list(values.values())).sum(), {name: value.detach() for name, value in values.items()}


class Decoded(nn.Module):
    """What one branch's decoder says, as a network that can be evaluated like the teacher."""

    def __init__(self, teacher: Network, coders: Coders, branch: str):
        super().__init__()
        self.teacher, self.coders, self.branch = teacher, coders, BRANCHES.index(branch)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        pooled = self.teacher(images, want=("pooled",)).pooled
        decoded = self.coders(pooled)[self.branch]
        # Of classes that were not trained on, logits retrieve as an embedding does.
        return Output(embedding=decoded) if "embedding" in want else Output(logits=decoded)


def read_coders(path: "Path | str", teacher: Network) -> Coders:
    """The coders in a file or run of `metric-kd granularity`; ``UserError`` where it holds none, or another teacher's."""
    content = read_checkpoint(path, "file of coders")
    if "coders" not in content:
        raise UserError(
            f"--granularity_load {path} holds no coders; give a run of `metric-kd granularity` or its best.pth."
        )
    coders = Coders(CodersSpec.from_dict(content["coders"]))
    load_weights(coders, content["model"], strict=True)
    digest = weights_digest(teacher)
    if coders.spec.teacher != digest:
        raise UserError(
            f"the coders in {path} were fitted to another teacher ({coders.spec.teacher}, this one is {digest}); fit them "
            "to this one with `metric-kd granularity --teacher_load ...`."
        )
    return coders


def coded(teacher: Network, path: "Path | str", stable: bool) -> CodedTeacher:
    """The teacher with the coders of a file; ``stable``: MAS, else MAG."""
    return CodedTeacher(teacher, read_coders(path, teacher), stable)
