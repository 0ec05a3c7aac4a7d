"""What training did to the weights: how far each moved in every epoch, and whole checkpoints at chosen epochs."""

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metric_kd.engine.checkpoint import write_checkpoint, write_text
from metric_kd.engine.logging import Observer
from metric_kd.engine.written import Written
from metric_kd.errors import UserError
from metric_kd.plain import parse_json

PAPER_EPOCHS = (0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 110, 130, 150)
LATER_EPOCHS = (170, 190, 240, 280, 320, 360, 400)
"""The epochs whose checkpoints were analysed by the program of 'Explaining Knowledge Distillation by Quantifying the
Knowledge' (CVPR 2020, arXiv 2003.03622), and those that it adds for longer runs."""


def chosen_epochs(text: str, last: int) -> frozenset[int]:
    """The epochs that ``--record_weights`` asks for: "all", "paper", or numbers as in "0,5,10"; the last is always one.

    Epoch 0 is the network before its first step. "paper" is the paper's 15 of 150 epochs, at the same shares of a shorter
    run. Raises ``UserError`` for anything else; later epochs than the last are left out.
    """
    if text == "all":
        return frozenset(range(last + 1))
    if text == "paper":
        share = min(last / PAPER_EPOCHS[-1], 1.0)
        wanted = {math.floor(epoch * share + 0.5) for epoch in PAPER_EPOCHS} | set(LATER_EPOCHS)
    elif re.fullmatch(r"\d+(,\d+)*", text):
        wanted = {int(number) for number in text.split(",")}
    else:
        raise UserError(f"--record_weights {text!r} is not understood; write all, paper, or epochs as in 0,5,10.")
    return frozenset(epoch for epoch in wanted if epoch <= last) | {last}


class Distances(NamedTuple):
    """How far one weight tensor moved, in Frobenius norms: start = |w_0|, and for the epochs 0..E (0 at epoch 0)
    path = sum over the steps of the epoch of |w_t - w_(t-1)|, chord = |w_k - w_(k-1)| between the ends of epochs."""

    start: float
    path: list[float]
    chord: list[float]


class WeightRecord(Observer):
    """Writes FOLDER/distances.json, a :class:`Distances` for every weight tensor of two or more dimensions, and
    FOLDER/epochNNNN.pth for the chosen epochs. Epochs are counted over all stages.

    The reference program keeps only the path, the paper's text (as we recall it) the chord. state_of: what a checkpoint
    of the network holds. written: the list of our files that those of the folder are on, by default one of its own. Costs
    two copies of the weights while training, and one in last.pth.
    """

    name = "weights"

    def __init__(
        self,
        network: nn.Module,
        folder: Path,
        epochs: Collection[int],
        state_of: Callable[[], dict[str, Any]],
        written: Written | None = None,
    ):
        self.folder, self.epochs, self.state_of = folder, epochs, state_of
        self.written = Written(folder) if written is None else written
        self.weights = {name: weight for name, weight in network.named_parameters() if weight.ndim > 1}
        self.start: list[float] = []
        self.path: list[list[float]] = []
        self.chord: list[list[float]] = []

    def begin(self) -> None:
        self._check()
        self._clear(-1)
        self.start = self._norms(self._now()).tolist()
        self.path, self.chord = [[0.0] * len(self.start)], [[0.0] * len(self.start)]
        self._restart(self._copy())
        self._write()

    def step_end(self) -> None:
        self.moved += self._norms(torch._foreach_sub(self._now(), self.before))
        torch._foreach_copy_(self.before, self._now())

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.path.append(self.moved.tolist())
        self.chord.append(self._norms(torch._foreach_sub(self._now(), self.epoch_start)).tolist())
        self._restart(self._copy())
        self._write()

    def state(self) -> dict[str, Any]:
        return {
            "start": self.start,
            "path": self.path,
            "chord": self.chord,
            "moved": self.moved,
            "epoch_start": self.epoch_start,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._check()
        self.start, self.path, self.chord = state["start"], state["path"], state["chord"]
        self._restart([kept.to(now.device) for kept, now in zip(state["epoch_start"], self._now(), strict=True)])
        self.moved += state["moved"].to(self.moved.device)
        self._clear(len(self.path) - 1)
        self._write_distances()

    def _check(self) -> None:
        """Raise ``UserError`` where somebody else's file has a name that will be needed, before it is."""
        folder = self.folder.relative_to(self.written.folder)
        self.written.check((folder / f"epoch{epoch:04d}.pth").as_posix() for epoch in self.epochs)

    def _now(self) -> list[Tensor]:
        return [weight.detach() for weight in self.weights.values()]

    def _copy(self) -> list[Tensor]:
        return [weight.clone() for weight in self._now()]

    def _norms(self, tensors: Any) -> Tensor:
        """(weights,) float64, on their device: a step never waits for it."""
        return torch.stack(list(torch._foreach_norm(tensors))).double()

    def _restart(self, epoch_start: list[Tensor]) -> None:
        self.epoch_start, self.before = epoch_start, self._copy()
        self.moved = torch.zeros(len(epoch_start), dtype=torch.float64, device=epoch_start[0].device)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        epoch = len(self.path) - 1
        if epoch in self.epochs:
            write_checkpoint(self.written.claim(self.folder / f"epoch{epoch:04d}.pth"), self.state_of())
        self._write_distances()

    def _write_distances(self) -> None:
        content = {
            name: Distances(self.start[k], [row[k] for row in self.path], [row[k] for row in self.chord])._asdict()
            for k, name in enumerate(self.weights)
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.written.claim(self.folder / "distances.json"), json.dumps(content) + "\n")

    def _clear(self, after: int) -> None:
        """Remove what an interrupted run wrote of later epochs: they will run again."""
        later = [file for epoch, file in checkpoints_of(self.folder).items() if epoch > after]
        self.written.remove_some(file.relative_to(self.written.folder).as_posix() for file in later)


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Epoch -> checkpoint, in the order of epochs."""
    found = {
        int(match[1]): file for file in folder.glob("epoch*.pth") if (match := re.fullmatch(r"epoch(\d+)", file.stem))
    }
    return dict(sorted(found.items()))


def read_distances(folder: Path) -> dict[str, Distances]:
    """Weight -> its distances. Raises ``UserError`` where there is no record, or a damaged one."""
    file = folder / "distances.json"
    try:
        content = parse_json(file.read_text())
        return {name: Distances(**entry) for name, entry in content.items()}
    except FileNotFoundError:
        raise UserError(f"{folder} holds no record of weights; train that run with --record_weights paper.") from None
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy it again.") from error
