"""What a run says while it trains: running means on the device, one JSON line per epoch, TensorBoard if installed."""

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metric_kd.distributed import average
from metric_kd.errors import UserError


class Observer:
    """Told by the trainer, on the main process, what happens; a command hands the trainer a list of observers.

    name: under it the checkpoint keeps :meth:`state`.
    """

    name = ""

    def begin(self) -> None:
        """Before the first step of a run that is not resumed."""

    def step_end(self) -> None:
        """After every step of the optimiser."""

    def epoch_end(self, record: dict[str, Any]) -> None:
        """After every epoch of every stage, before its checkpoint; ``record`` is its line of metrics.jsonl."""

    def state(self) -> dict[str, Any]:
        """What the checkpoint must keep: tensors and plain values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`, once the weights are those of the checkpoint."""


class RunningMeans:
    """Sums over the steps of an epoch, on the device, in float64, and how many there are; as checkpoints keep them.

    :meth:`state` is that of all processes, which call it together.
    """

    def __init__(self, size: int, device: torch.device):
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.count = 0

    def reset(self) -> None:
        self.sums.zero_()
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"sums": average(self.sums).cpu(), "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.sums.copy_(state["sums"])
        self.count = state["count"]


class RunningLosses(RunningMeans):
    """Sums of the losses of an epoch and the first step at which each was not finite.

    Everything stays on the device until :meth:`means` or :meth:`check`, so that a step never waits for the device.
    :meth:`means` and :meth:`state` are those of all processes, which call them together.
    """

    def __init__(self, names: list[str], device: torch.device):
        super().__init__(len(names) + 1, device)
        self.names = [*names, "the sum of losses"]
        self.first_bad = torch.full((len(self.names),), -1, dtype=torch.int64, device=device)

    def add(self, total: Tensor, values: dict[str, Tensor], step: int) -> None:
        now = torch.stack([*values.values(), total.detach()]).double()
        bad = ~torch.isfinite(now) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)
        self.sums += now
        self.count += 1

    def check(self, last: Path) -> None:
        """Raise ``UserError`` where some term was not finite, naming the earliest term and step."""
        first = [(step, name) for name, step in zip(self.names, self.first_bad.tolist(), strict=True) if step >= 0]
        if first:
            step, name = min(first, key=lambda pair: (pair[0], self.names.index(pair[1])))
            raise UserError(not_finite(f"loss {name!r}", step, last))

    def means(self) -> dict[str, float]:
        values = (average(self.sums) / max(self.count, 1)).tolist()
        return dict(zip([*self.names[:-1], "loss"], values, strict=True))


def not_finite(what: str, step: int, last: Path) -> str:
    """What was not finite and what to do; ``last`` is the last good checkpoint, where there is one."""
    kept = f"; the last good checkpoint is {last}, which --load takes" if last.is_file() else ""
    return f"{what} was not finite at step {step}; start again in a new --save_dir with a lower --lr or --clip_norm 1{kept}."


def epoch_line(record: dict[str, Any], title: str, epochs: int) -> str:
    """One honest line per epoch."""
    known = ("stage", "epoch", "step", "loss", "losses", "gradient_shares", "lr", "seconds")
    metrics = [f"{key} {100 * value:.2f}" for key, value in record.items() if key not in known]
    parts = [f"{name} {value:.4f}" for name, value in record["losses"].items()]
    shares = [f"{name} {100 * value:.0f}%" for name, value in record.get("gradient_shares", {}).items()]
    if shares:
        parts.append(f"of the gradient: {', '.join(shares)}")
    return "  ".join(
        [
            f"{title} {record['epoch']}/{epochs}",
            f"loss {record['loss']:.4f}",
            *parts,
            *metrics,
            f"{record['seconds']:.1f} s",
        ]
    )


class TensorBoard(Observer):
    """Writes the numbers of every epoch, counted over all stages, for TensorBoard; made by :meth:`if_installed`."""

    def __init__(self, writer: Any, epochs: int):
        self.writer, self.epochs = writer, epochs

    @classmethod
    def if_installed(cls, folder: Path, epochs: int, made: Callable[[Path], object]) -> "TensorBoard | None":
        """epochs: how many are finished; what an earlier start wrote of later ones is dropped. made: told of the file."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        mark = f".metric_kd-{secrets.token_hex(8)}"  # others may write into this folder too
        writer = SummaryWriter(str(folder), purge_step=epochs + 1, filename_suffix=mark)
        for file in folder.glob(f"*{mark}"):
            made(file)
        return cls(writer, epochs)

    def epoch_end(self, record: dict[str, Any]) -> None:
        self.epochs += 1
        stage = f"{record['stage']}/" if "stage" in record else ""
        for key, value in record.items():
            if isinstance(value, dict):
                for name, part in value.items():
                    self.writer.add_scalar(f"{stage}{key}/{name}", part, self.epochs)
            elif isinstance(value, int | float) and key != "epoch":
                self.writer.add_scalar(f"{stage}{key}", value, self.epochs)
        self.writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        self.writer.close()
