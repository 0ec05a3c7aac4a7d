"""Kill a run at a step, and compare what a resumed run and an undisturbed one left."""

import json
from pathlib import Path

import torch

from metric_kd.engine.checkpoint import read_checkpoint
from metric_kd.engine.trainer import Trainer


class Killed(BaseException):
    """What SIGKILL is to a process."""


def kill_at(step: int, monkeypatch) -> None:
    """Let the trainer die in the middle of a step, counted from 1 over all stages."""
    update = Trainer._update

    def mortal(self, batch):
        if self.step == step:
            raise Killed
        update(self, batch)

    monkeypatch.setattr(Trainer, "_update", mortal)


def weights(run: Path, name: str = "best.pth") -> dict:
    return read_checkpoint(run / name)["model"]


def same(one: Path, other: Path, name: str = "best.pth") -> bool:
    """Whether two runs hold the same network, bit for bit."""
    first, second = weights(one, name), weights(other, name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def history(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
