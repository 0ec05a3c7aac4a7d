"""Factor transfer: a paraphraser puts the teacher's map in other words, a translator brings the student's there."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from metric_kd.distances import at_least_float32, full_precision, unit_rows
from metric_kd.distill.connectors import Norm
from metric_kd.distill.layers import paired_maps, pool_to_smaller
from metric_kd.distill.stages import stage_length
from metric_kd.errors import UserError
from metric_kd.losses.term import TERMS, Stage, Term
from metric_kd.models.cifar import initialise
from metric_kd.types import Batch, Output


def ft(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """Mean absolute gap between factors of unit length.

    loss = mean over N and all elements of |z^(student) - z^(teacher)|, z^ = z / |z|_2 over a whole factor. A factor
    shorter than 1e-6 counts as zero and gets no gradient.

    Two tensors of one shape, (N, ...) (else ``UserError``). Half types are raised to float32; no gradient reaches the
    teacher.

    Kim, Park, Kwak: Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018, arXiv 1802.04977
    (p = 1). Deviation: a mean where the paper takes the norm (as in the KD Zoo). RepDistiller has another loss of this
    name: this one, of the factors' attention maps mean_c z_c^2.
    """
    if student_factor.shape != teacher_factor.shape or student_factor.ndim < 2:
        raise UserError(
            f"ft compares factors of one shape; got {tuple(student_factor.shape)} and {tuple(teacher_factor.shape)}: "
            "bring them there with a translator and pooling, as --loss ft does."
        )
    with full_precision(student_factor):
        student = unit_rows(student_factor.flatten(1))
        return l1_loss(student, unit_rows(teacher_factor.detach().flatten(1)).to(student))


class Paraphraser(nn.Module):
    """Convolutional auto-encoder of the teacher's map (N, C, H, W), with k C channels in its middle: the factor.

    encoder: 3x3 convolutions C, C, kC, kC; decoder: transposed ones kC, kC, C, C; each followed by batch normalisation
    (or else with a bias) and LeakyReLU(0.1); grids stay. Raises ``UserError`` where k leaves no channel.
    """

    def __init__(self, channels: int, k: float = 0.5, batch_norm: bool = False):
        super().__init__()
        factor = factor_channels(channels, k)
        self.encoder = _layers(nn.Conv2d, (channels, channels, factor, factor), batch_norm)
        self.decoder = _layers(nn.ConvTranspose2d, (factor, factor, channels, channels), batch_norm)
        initialise(self)  # transposed convolutions keep PyTorch's own

    def forward(self, maps: Tensor) -> Tensor:
        """The reconstruction of the maps; ``encoder`` alone gives the factor."""
        return self.decoder(self.encoder(maps))  # type: ignore[no-any-return]


class Translator(nn.Module):
    """As the paraphraser's encoder, from the student's C_s channels: C_s, C_s, k C_t, k C_t."""

    def __init__(self, channels: int, teacher_channels: int, k: float = 0.5, batch_norm: bool = False):
        super().__init__()
        factor = factor_channels(teacher_channels, k)
        self.encoder = _layers(nn.Conv2d, (channels, channels, factor, factor), batch_norm)
        initialise(self)

    def forward(self, maps: Tensor) -> Tensor:
        return self.encoder(maps)  # type: ignore[no-any-return]


def factor_channels(channels: int, k: float) -> int:
    """k C, whole; ``UserError`` where that is none."""
    if not k > 0 or int(k * channels) < 1:
        raise UserError(
            f"ft with k={k:g} leaves no channel of the teacher's {channels}; choose a larger k, as in k=0.5."
        )
    return int(k * channels)


def _layers(kind: type[nn.Module], widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    """The identity holds the place of the batch normalisation, so that names in a checkpoint do not depend on it."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(kind(inputs, outputs, 3, padding=1, bias=not batch_norm))
        layers.append(Norm(outputs) if batch_norm else nn.Identity())
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


@TERMS.register("ft")
class FT(Term):
    """:func:`ft` between the translated last map of the student and the paraphrased one of the teacher.

    First, in a stage of its own, the paraphraser learns to reconstruct the teacher's map (mean squared error), without
    the student; from then on it is frozen, its batch normalisation included, and the translator learns with the
    student. Where grids differ the larger factor is averaged down. ``k``: channels of the factor per channel of the
    teacher; ``batch_norm``: in both networks (the KD Zoo has it for CIFAR-10 only); ``stage_epochs``: length of the own
    stage, 0 for 15 % of the run. Default weight 200: the Zoo's. Raises ``UserError`` where k leaves no channel.
    """

    needs = ("maps",)
    reads_teacher = True
    family = "feature"
    cost = "N C^2 H W"
    default_weight = 200.0
    paper = "Paraphrasing Complex Network: Network Compression via Factor Transfer, 2018, arXiv 1802.04977"

    def __init__(self, k: float = 0.5, batch_norm: bool = False, stage_epochs: int = 0):
        super().__init__()
        if not k > 0:
            raise UserError(f"ft needs k > 0, channels of the factor per channel of the teacher; got {k:g}.")
        self.k, self.batch_norm = k, batch_norm
        self.stage_epochs = stage_length("ft", stage_epochs)
        self.frozen = False
        self.paraphraser: nn.Module = nn.Identity()
        self.translator: nn.Module = nn.Identity()

    def build(self, student: Output, teacher: Output | None, num_classes: int) -> None:
        ((ours, theirs),) = paired_maps(student, teacher, (), count=1)
        channels = theirs.shape[1]
        self.paraphraser = Paraphraser(channels, self.k, self.batch_norm).to(theirs.device)
        self.translator = Translator(ours.shape[1], channels, self.k, self.batch_norm).to(ours.device)

    def forward(self, student: Output, teacher: Output | None, batch: Batch) -> Tensor:
        ((ours, theirs),) = paired_maps(student, teacher, (), count=1)
        with torch.no_grad():
            wanted = self.paraphraser.encoder(at_least_float32(theirs))  # type: ignore[operator]
        return ft(*pool_to_smaller(self.translator(at_least_float32(ours)), wanted))

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("ft", share=0.15, epochs=self.stage_epochs, lr=0.1, trains_student=False, nesterov=False),)

    def stage_forward(self, stage: str, student: Output | None, teacher: Output | None, batch: Batch) -> Tensor:
        assert teacher is not None and teacher.maps
        maps = at_least_float32(teacher.maps[-1].detach())
        rebuilt = self.paraphraser(maps)
        with full_precision(maps):
            return mse_loss(at_least_float32(rebuilt), maps)

    def enter(self, stage: str | None) -> None:
        self.frozen = stage is None
        self.paraphraser.requires_grad_(not self.frozen)
        self.translator.requires_grad_(self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "FT":
        super().train(mode)
        if self.frozen:
            self.paraphraser.eval()
        return self
