"""A call of every method's pure function on drawn tensors: what tests over all methods iterate."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import metric_kd.functional as KD
from metric_kd.distances import unit_rows

N = 6


class Case(NamedTuple):
    """loss(student, teacher), and the shapes of one image of each."""

    loss: Callable[[Tensor, Tensor], Tensor]
    student: tuple[int, ...]
    teacher: tuple[int, ...]


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers of one network in one tensor."""
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def in_halves(loss):
    return lambda student, teacher: loss(halves(student), halves(teacher))


def afd(student: Tensor, teacher: Tensor) -> Tensor:
    return KD.afd(student, teacher, drawn(5, *student.shape[:2]).softmax(1))


def ofd(student: Tensor, teacher: Tensor) -> Tensor:
    return KD.ofd(student, teacher, KD.ofd_margin(teacher))


def vid(student: Tensor, teacher: Tensor) -> Tensor:
    return KD.vid(student, teacher, torch.linspace(0.5, 2, student.shape[1]))


def crd(student: Tensor, teacher: Tensor) -> Tensor:
    """Anchors of unit length, as they are behind the term's layers, fixed memories of 12 images, Z as after a batch."""
    memories = [unit_rows(drawn(seed, 12, 4)) for seed in (5, 6)]
    rows = (torch.arange(len(student))[:, None] + torch.arange(5)) % 12
    return KD.crd(unit_rows(student), unit_rows(teacher), *memories, rows, log_z=drawn(7, 2))


MAPS = (4, 4, 4)
CASES = {
    "ab": Case(KD.ab, MAPS, MAPS),
    "afd": Case(afd, MAPS, MAPS),
    "at": Case(KD.at, MAPS, (6, 2, 2)),
    "bss": Case(KD.bss, (5,), (5,)),
    "cc": Case(KD.cc, (4,), (7,)),
    "crd": Case(crd, (4,), (4,)),
    "csd": Case(KD.csd, (4,), (4,)),
    "dark_rank": Case(KD.dark_rank, (4,), (7,)),
    "dml": Case(KD.dml, (5,), (5,)),
    "fitnet": Case(KD.fitnet, MAPS, MAPS),
    "fsp": Case(in_halves(KD.fsp), MAPS, (4, 2, 2)),
    "ft": Case(KD.ft, MAPS, MAPS),
    "granularity": Case(in_halves(KD.granularity), (8,), (8,)),
    "imitate": Case(KD.imitate, MAPS, MAPS),
    "irg_edge": Case(KD.irg_edge, (4,), MAPS),
    "irg_transformation": Case(in_halves(KD.irg_transformation), (8,), (6,)),
    "irg_vertex": Case(KD.irg_vertex, (5,), (5,)),
    "kdsvd": Case(in_halves(KD.kdsvd), (6, 4, 4), (6, 4, 4)),
    "logits": Case(KD.logits, (5,), (5,)),
    "lwm": Case(KD.lwm, (4, 4), (2, 2)),
    "nst": Case(KD.nst, (3, 4, 4), (5, 2, 2)),
    "nst of few positions": Case(KD.nst, (6, 2, 2), (5, 2, 2)),
    "ofd": Case(ofd, MAPS, MAPS),
    "pkt": Case(KD.pkt, (4,), (7,)),
    "regression": Case(KD.regression, (4,), (4,)),
    "rkd_angle": Case(KD.rkd_angle, (4,), (7,)),
    "rkd_distance": Case(KD.rkd_distance, (4,), (7,)),
    "sobolev": Case(KD.sobolev, (3, 4, 4), (3, 4, 4)),
    "sp": Case(KD.sp, MAPS, (7,)),
    "st": Case(KD.st, (5,), (5,)),
    "vid": Case(vid, MAPS, MAPS),
}


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(name, seed, n=N):
    """A student's and a teacher's features of n images, in float64."""
    case = CASES[name]
    return drawn(seed, n, *case.student), drawn(seed + 1, n, *case.teacher)


def run(name, student, teacher):
    """The loss and its gradient in the student."""
    leaf = student.detach().clone().requires_grad_()
    value = CASES[name].loss(leaf, teacher)
    value.backward()
    return value.detach(), leaf.grad
