"""The trainer: stage by stage, sum the terms, step, save. It knows neither methods nor metrics, only a task."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from metric_kd import distributed
from metric_kd.data.loading import ImageLoader
from metric_kd.distill.granularity import Coders
from metric_kd.engine import reproducibility
from metric_kd.engine.checkpoint import write_checkpoint
from metric_kd.engine.interruption import StopRequest
from metric_kd.engine.logging import Observer, RunningLosses, epoch_line, not_finite
from metric_kd.engine.memory import batch_that_fits, is_out_of_memory, out_of_memory
from metric_kd.engine.optimisation import Settings, learning_rate, make_optimizer, stage_settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Task
from metric_kd.errors import UserError
from metric_kd.losses.term import Stage
from metric_kd.models.network import Network
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
        if distributed.world_size() > 1 and self.module is self.task:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.task, device_ids=ids, find_unused_parameters=True)
            # Statistics need not be alike while they are only written: evaluation and checkpoints take the main process's.
            self.module.broadcast_buffers = False

    def _train_epoch(self, started: float) -> None:
        self._enter_training()
        # Stages before the main one draw from epochs of their own: the main stage sees the same data with and without them.
        epoch = self.epoch if self.stage_name is None else (self.stage + 1 << 32) + self.epoch
        order = self.batches.epoch(epoch)
        todo = order[self.iteration :]
        stream = tqdm(
            self.loader.train(todo, epoch),
            desc=f"{self._title()} {self.epoch}/{self.settings.epochs}",
            total=len(order),
            initial=self.iteration,
            disable=not distributed.is_main(),
            leave=False,
            mininterval=0.5,
        )
        for batch in stream:
            self._step(batch.to(self.device))
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

    def _step(self, batch: Batch) -> None:
        rate = learning_rate(self.settings, self.epoch, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.step += 1
        reproducibility.seed_step(self.settings.seed, self.step, distributed.rank())
        try:
            self._update(batch)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Out of the except block the failed step is forgotten, and with it the memory that it held.
        if distributed.world_size() > 1:  # the others would wait for every attempt
            raise UserError(out_of_memory(len(batch.labels), distributed.world_size()))
        raise UserError(batch_that_fits(self.task, batch, self.optimizer))

    def trial_step(self, batch: Batch) -> dict[str, float]:
        """One real step whose result nobody keeps: the values of the losses. For a measurement of its cost."""
        self._enter_training()
        self._step(batch)
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

    def _update(self, batch: Batch) -> None:
        total, values = self.module(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses.add(total, values, self.step)
        self._tell(lambda observer: observer.step_end())

    def _clip(self) -> None:
        if self.settings.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            for group in self.optimizer.param_groups:  # of peers each on its own
                nn.utils.clip_grad_norm_(group["params"], self.settings.clip_norm)

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
            self._check_finite()
            write_checkpoint(self.run.best_of(name), {**self.state_of(self.task.networks[name]), "metrics": metrics})

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
        losses = self.losses.state()
        states = distributed.gather_objects(reproducibility.random_states())
        if distributed.is_main():
            self._check_finite()
            write_checkpoint(
                self.run.last,
                {
                    **self.state_of(self.task.student),
                    "task": {key: value for key, value in self.task.state_dict().items() if value is not None},
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "losses": losses,
                    "position": {
                        "stage": self.stage,
                        "stages": [entered[1].name for entered in self.stages if entered],
                        "epoch": self.epoch,
                        "iteration": self.iteration,
                        "step": self.step,
                        "lines": self.lines,
                        "of": len(self.batches),
                    },
                    "seconds": self.seconds + seconds,
                    "best": self.best,
                    "random": states,
                    "observers": {o.name: o.state() for o in self.observers if o.name},
                    "environment": self.environment,
                    "config": self.config,
                },
            )
        self._saved_at = time.monotonic()

    def resume(self) -> bool:
        """Continue from last.pth; False where there is none. Raises ``UserError`` where it belongs to another run.

        On another number of processes too: batches are drawn for all of them together. Only where their number in an epoch
        differs, because the images do not divide evenly, a run that stopped within an epoch is refused.
        """
        there = distributed.gather_objects(self.run.last.is_file())
        if any(there) and not all(there):
            raise UserError(
                f"only some processes see {self.run.last}; put --save_dir where all machines see the same files."
            )
        if not any(there):
            if distributed.is_main():
                self.run.cut_history(0)
            return False
        state = self.run.read_last(self.config)
        student = self.task.student
        if state[student.role] != student.spec.to_dict():
            raise UserError(
                f"{self.run.path} holds other {student.role} than these, of another teacher or form; give another "
                "--save_dir, or --resume never to start over."
            )
        stored = state["environment"]
        for key, value in self.environment.items():
            if stored.get(key) != value and distributed.is_main():
                tqdm.write(
                    f"warning: {self.run.last} was written with {key} {stored.get(key)}, this is {value}; "
                    "the result will not equal that of an undisturbed run bit for bit."
                )
        position = state["position"]
        if position["iteration"] and position.get("of", len(self.batches)) != len(self.batches):
            raise UserError(
                f"{self.run.path} stopped within an epoch of {position['of']} steps and for this number of processes an epoch "
                f"has {len(self.batches)}; start as many processes as before ({stored.get('processes')})."
            )
        self.enter_stage(position["stage"])
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.losses.restore(state["losses"])
        self.epoch, self.iteration, self.step = position["epoch"], position["iteration"], position["step"]
        self.lines = position["lines"]
        self.seconds, self.best = state["seconds"], state["best"]
        kept = state["observers"]
        self._tell(lambda observer: observer.restore(kept[observer.name]) if observer.name in kept else None)
        if len(state["random"]) == distributed.world_size():
            reproducibility.restore_random_states(state["random"][distributed.rank()])
        if distributed.is_main():
            self.run.cut_history(self.lines)
        return True

    def _check_finite(self) -> None:
        """Never save weights that are not finite: the last good checkpoint stays."""
        state: dict[str, Tensor] = {name: p for name, p in self.task.named_parameters() if p.is_floating_point()}
        for name, network in self.task.networks.items():
            state |= {f"{name}.{key}": buffer for key, buffer in network.named_buffers() if buffer.is_floating_point()}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in state.values()]).tolist()
        for name, good in zip(state, finite, strict=True):
            if not good:
                raise UserError(not_finite(f"weight {name!r}", self.step, self.run.last))


def freeze_batch_norm(network: nn.Module) -> None:
    """Use, and do not update, the running statistics of batch normalisation."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
