"""The trainer: stage by stage, sum the terms, step, save. It knows neither methods nor metrics, only a task."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from metric_kd import distributed, kernels
from metric_kd.data.loading import ImageLoader
from metric_kd.distill.granularity import Coders
from metric_kd.engine import reproducibility
from metric_kd.engine.accumulation import accumulate, exchanging, groups
from metric_kd.engine.checkpoint import write_checkpoint
from metric_kd.engine.gradients import GradientShares
from metric_kd.engine.interruption import StopRequest
from metric_kd.engine.logging import Observer, RunningLosses, epoch_line
from metric_kd.engine.memory import is_out_of_memory, way_out
from metric_kd.engine.optimisation import Settings, clip, learning_rate, make_optimizer, set_rate, stage_settings
from metric_kd.engine.replay import Replay
from metric_kd.engine.resuming import check_finite, read_progress
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Task
from metric_kd.errors import UserError
from metric_kd.losses.term import Stage
from metric_kd.models.network import Network
from metric_kd.modes import freeze_batch_norm
from metric_kd.types import Batch

Evaluate = Callable[[nn.Module], dict[str, float]]


class BatchSampler(Protocol):
    """Which rows make up the batches of an epoch, for this rank; deterministic in the epoch."""

    def epoch(self, epoch: int) -> list[np.ndarray]: ...
    def __len__(self) -> int: ...


class Trainer:
    """Runs ``task`` through its stages and then over the epochs of ``settings``, saves whole checkpoints, resumes bit for bit.

    Every stage has a fresh optimiser. evaluate(network) -> metrics is called in the main stage, after every
    ``eval_every``-th epoch and after the last, on all processes; the main one's metrics count. ``select``: the metric by
    which best.pth is chosen, or None for the network of the last epoch. about: plain values that every checkpoint of a
    network holds as well.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        run: RunDirectory,
        loader: ImageLoader,
        batches: BatchSampler,
        device: torch.device,
        *,
        evaluate: Evaluate | None = None,
        select: str | None = None,
        eval_every: int = 1,
        observers: Sequence[Observer] = (),
        config: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.task, self.main_settings, self.run, self.loader, self.batches = task, settings, run, loader, batches
        self.device, self.evaluate, self.select, self.eval_every = device, evaluate, select, eval_every
        self.observers, self.config, self.about = observers, config or {}, about or {}
        self.stages: list[tuple[str, Stage] | None] = [*task.stages(), None]
        self.losses = RunningLosses(task.loss_names, device)
        self.gradients = GradientShares(task, settings.log_gradients, device)
        self.replay = Replay(task, settings.chunk) if settings.chunk else None
        self.step = 0
        self.lines = 0  # of metrics.jsonl: finished epochs over all stages
        self.enter_stage(0)
        self.best: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        self.environment = reproducibility.environment(device)
        self.module: nn.Module = task
        self.stop = StopRequest()
        self._saved_at = time.monotonic()

    def enter_stage(self, stage: int) -> None:
        """Begin a stage (the last one is the main stage) with its own settings and a fresh optimiser."""
        self.stage, self.epoch, self.iteration = stage, 1, 0
        entered = self.stages[stage]
        self.settings = self.main_settings if entered is None else stage_settings(self.main_settings, entered[1])
        self.task.enter(entered)
        for parameter in self.task.parameters():
            parameter.grad = None  # of the stage before
        self.optimizer = make_optimizer(self.settings, self.task.parameter_groups())
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")
        self.module = self.task

    @property
    def stage_name(self) -> str | None:
        """Name of the present stage; None in the main one."""
        entered = self.stages[self.stage]
        return None if entered is None else entered[1].name

    @property
    def steps(self) -> int:
        """Of an epoch; each takes ``settings.accumulate`` batches, the last what is left."""
        return -(-len(self.batches) // self.settings.accumulate)

    @property
    def total_epochs(self) -> int:
        """Of all stages together."""
        return sum(
            self.main_settings.epochs if entered is None else stage_settings(self.main_settings, entered[1]).epochs
            for entered in self.stages
        )

    def fit(self) -> None:
        """Train from the current position to the last epoch of the main stage."""
        with self.stop.listening():
            if self.step == 0:
                self._tell(lambda observer: observer.begin())
            while True:
                self._fit_stage()
                if self.stage == len(self.stages) - 1:
                    return
                self.enter_stage(self.stage + 1)

    def _fit_stage(self) -> None:
        self._wrap()
        while self.epoch <= self.settings.epochs:
            started = time.monotonic()
            self._train_epoch(started)
            self._close_epoch(started)
            self.stop.raise_if_made()

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self.observers if distributed.is_main() else ():
            what(observer)

    def _wrap(self) -> None:
        if self.module is self.task:
            self.module = exchanging(self.task, self.device, averages=self.replay is None)

    def _train_epoch(self, started: float) -> None:
        self._enter_training()
        # Stages before the main one draw from epochs of their own: the main stage sees the same data with and without them.
        epoch = self.epoch if self.stage_name is None else (self.stage + 1 << 32) + self.epoch
        order = self.batches.epoch(epoch)
        todo = order[self.iteration * self.settings.accumulate :]
        stream = tqdm(
            groups(self.loader.train(todo, epoch), self.settings.accumulate),
            desc=f"{self._title()} {self.epoch}/{self.settings.epochs}",
            total=self.steps,
            initial=self.iteration,
            disable=not distributed.is_main(),
            leave=False,
            mininterval=0.5,
        )
        for batches in stream:
            self._step(batches)
            self.iteration += 1
            if self.step % self.settings.log_interval == 0:
                self.losses.check(self.run.last)
                stream.set_postfix(loss=f"{self.losses.means()['loss']:.4f}", refresh=False)
            self._save_within_epoch(started)

    def _title(self) -> str:
        return "epoch" if self.stage_name is None else f"stage {self.stage_name}, epoch"

    def _save_within_epoch(self, started: float) -> None:
        """Save where the clock or a signal asks for it; all ranks decide together."""
        due = time.monotonic() - self._saved_at > 60 * self.settings.save_minutes
        if distributed.world_size() == 1 or self.step % self.settings.log_interval == 0:
            signalled = self.stop.made()
            if signalled or distributed.from_main(due):
                self.save(time.monotonic() - started)
            if signalled:
                self.stop.raise_if_made()

    def _step(self, batches: Sequence[Batch]) -> None:
        set_rate(self.optimizer, learning_rate(self.settings, self.epoch, self.iteration))
        self.step += 1
        self._seed(0)
        try:
            with reproducibility.sums_in_order(self.device):
                self._update(batches)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Out of the except block the failed step is forgotten, and with it the memory that it held.
        raise UserError(way_out(self.task, batches[0].to(self.device), self.optimizer, self.settings))

    def _seed(self, part: int) -> None:
        """Seed what is drawn for one of the batches of the present step."""
        reproducibility.seed_step(self.settings.seed, self.step, distributed.rank(), part)

    def trial_step(self, *batches: Batch) -> dict[str, float]:
        """One real step whose result nobody keeps: the values of the losses. For a measurement of its cost."""
        self._enter_training()
        self._step(batches)
        means = self.losses.means()
        self.losses.reset()
        return {name: means[name] for name in [*self.task.acting, "loss"]}

    def _enter_training(self) -> None:
        if self.stage_name is None:
            self.task.begin_epoch(self.epoch, self.settings.epochs)
        self.task.train()
        if self.settings.freeze_bn:
            for network in self.task.networks.values():
                freeze_batch_norm(network)

    def _update(self, batches: Sequence[Batch]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.gradients.measuring(self.step):
            if self.replay is not None:
                total, values = self.replay(batches[0].to(self.device), self.scaler.scale)
            else:
                total, values = accumulate(self.module, batches, self.device, self.scaler.scale, self._seed)
        if self.settings.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            clip(self.optimizer, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.add(total, values, self.step)
        self._tell(lambda observer: observer.step_end())

    def _close_epoch(self, started: float) -> None:
        self.losses.check(self.run.last)
        means = self.losses.means()
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": means.pop("loss"),
            "losses": {name: means[name] for name in self.task.acting},
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        record |= self.gradients.record(self.task.acting)
        if self.stage_name is not None:
            record = {"stage": self.stage_name, **record}
        due = self.epoch % self.eval_every == 0 or self.epoch == self.settings.epochs
        if self.evaluate is not None and due and self.stage_name is None:
            metrics = self._evaluate(started)
            for name, values in metrics.items():
                record.update(values if name == "student" else {f"{name}_{key}": v for key, v in values.items()})
                best = self.best.get(name, {})
                if self.select is not None and values[self.select] > best.get(self.select, -math.inf):
                    self.best[name] = {"epoch": self.epoch, **values}
                    self._write_best(name, self.best[name])
        elapsed = time.monotonic() - started
        record["seconds"] = round(self.seconds + elapsed, 3)
        self.losses.reset()
        self.gradients.reset()
        self.epoch, self.iteration, self.seconds = self.epoch + 1, 0, 0.0
        self.lines += 1
        if distributed.is_main():
            self.run.append_metrics(record)
            on_test = self.select is not None and not self.select.startswith("val_")
            line = epoch_line(record, self._title(), self.settings.epochs)
            tqdm.write(line + ("  (best is selected on test)" if on_test and self.stage_name is None else ""))
        self._tell(lambda observer: observer.epoch_end(record))
        self.save(0.0)

    def _evaluate(self, started: float) -> dict[str, dict[str, float]]:
        """Evaluation may take long, so the epoch is saved first and a signal stops it at once."""
        self.save(time.monotonic() - started)
        metrics: dict[str, dict[str, float]] = {}
        with self.stop.nothing_to_lose():
            if self.evaluate:
                metrics = {name: self.evaluate(network) for name, network in self.task.networks.items()}
        return distributed.from_main(metrics)  # type: ignore[no-any-return]

    def _write_best(self, name: str, metrics: dict[str, Any]) -> None:
        if distributed.is_main():
            check_finite(self.task, self.step, self.run.last)
            file = self.run.claim(self.run.best_of(name))
            write_checkpoint(file, {**self.state_of(self.task.networks[name]), "metrics": metrics})

    def state_of(self, network: Network | Coders) -> dict[str, Any]:
        """What a checkpoint holds of one network: what it is, and its weights."""
        return {network.role: network.spec.to_dict(), "model": network.state_dict(), **self.about}

    def finish(self, metrics: dict[str, dict[str, float]]) -> None:
        """Write the results (network -> its metrics) where they are the networks of the last epoch."""
        if self.select is None:
            for name, values in metrics.items():
                self._write_best(name, {"epoch": self.settings.epochs, **values})

    def save(self, seconds: float) -> None:
        """Write last.pth: everything that the rest of the run depends on."""
        self.losses.check(self.run.last)
        state = self.state_dict(seconds)
        if state is not None:
            check_finite(self.task, self.step, self.run.last)
            write_checkpoint(self.run.claim(self.run.last), state)
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Continue from last.pth; False where there is none. Raises ``UserError`` where it belongs to another run."""
        state = read_progress(self.run, self.config, self.task.student, self.steps, self.environment)
        if state is not None:
            self.load_state_dict(state)
        if distributed.is_main():
            self.run.cut_history(self.lines)
        return state is not None

    def state_dict(self, seconds: float) -> dict[str, Any] | None:
        """What last.pth holds; ``seconds``: of the epoch, since the start or the last resume.

        All processes call it together; the main one gets the content, the others None.
        """
        losses, gradients = self.losses.state(), self.gradients.state()
        # One that failed on the way is not what computes.
        self.environment["kernels"] = kernels.described(self.device)
        states = distributed.gather_objects(reproducibility.random_states())
        if not distributed.is_main():
            return None
        return {
            **self.state_of(self.task.student),
            "task": {key: value for key, value in self.task.state_dict().items() if value is not None},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": losses,
            "gradients": gradients,
            "position": {
                "stage": self.stage,
                "stages": [entered[1].name for entered in self.stages if entered],
                "epoch": self.epoch,
                "iteration": self.iteration,
                "step": self.step,
                "lines": self.lines,
                "of": self.steps,
            },
            "seconds": self.seconds + seconds,
            "best": self.best,
            "random": states,
            "observers": {o.name: o.state() for o in self.observers if o.name},
            "environment": self.environment,
            "config": self.config,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go where :meth:`state_dict` was called."""
        position = state["position"]
        self.enter_stage(position["stage"])
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.losses.restore(state["losses"])
        if "gradients" in state:
            self.gradients.restore(state["gradients"])
        self.epoch, self.iteration, self.step = position["epoch"], position["iteration"], position["step"]
        self.lines = position["lines"]
        self.seconds, self.best = state["seconds"], state["best"]
        kept = state["observers"]
        for observer in self.observers if distributed.is_main() else ():
            if observer.name in kept:
                observer.restore(kept[observer.name])
        if len(state["random"]) == distributed.world_size():
            reproducibility.restore_random_states(state["random"][distributed.rank()])
