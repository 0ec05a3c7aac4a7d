"""One run, one directory: what lies in it, who may write it, and what a second start finds there."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from metric_kd.engine.checkpoint import read_checkpoint, sweep, write_text
from metric_kd.engine.weight_record import remove_record
from metric_kd.errors import UserError
from metric_kd.locks import alone
from metric_kd.plain import TooMuch, parse_json, parse_yaml

RESUMABLE_KEYS = frozenset(
    {
        "epochs",
        "workers",
        "pack",
        "teacher_cache",
        "device",
        "save_minutes",
        "resume",
        "dry_run",
        "save_dir",
        "plugins",
        "log_gradients",
        "teacher_check",
    }
)
"""Config keys that may differ between the start of a run and its continuation."""
SEED_KEYS = (RESUMABLE_KEYS - {"epochs"}) | {"seed", "student_init"}
"""Config keys in which two runs may differ that are seeds of one another; compare gives each seed a start of its own."""


def check_folder(path: Path, flag: str) -> None:
    """Raise ``UserError``, naming the flag, where a file in this folder could not be written; leave nothing behind."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} is not writable ({error.strerror}); choose another folder.") from error


class RunDirectory:
    """The files of one run under ``path``; nothing is created before :meth:`open`."""

    def __init__(self, path: "Path | str", flag: str = "--save_dir"):
        self.path, self.flag = Path(path), flag
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.txt"
        self.best = self.path / "best.pth"
        self.last = self.path / "last.pth"
        self.card = self.path / "card.json"
        self.weights = self.path / "weights"

    def best_of(self, network: str) -> Path:
        """Where the result of a network lies: best.pth for the student, NAME.pth for a peer."""
        return self.best if network == "student" else self.path / f"{network}.pth"

    def check_writable(self) -> None:
        """Raise ``UserError`` where the directory could not be written, leaving nothing behind."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.flag} {self.path} is a file; give a folder.")
        check_folder(self.path, self.flag)

    def check_config(self, config: dict[str, Any]) -> None:
        """Refuse to continue a run that was started with another config, naming the first differing key."""
        stored = self.stored_config()
        if stored is not None:
            self._compare(stored, config)

    def _compare(self, stored: dict[str, Any], config: dict[str, Any]) -> None:
        for key in [*config, *(k for k in stored if k not in config)]:
            if key not in RESUMABLE_KEYS and stored.get(key) != config.get(key):
                raise UserError(
                    f"{self.path} holds a run with {key} {stored.get(key)!r}, this one has {config.get(key)!r}; "
                    "give another --save_dir, the same flags, or --resume never to start over."
                )
        if "epochs" in stored and config["epochs"] < stored["epochs"] and self.result.exists():
            raise UserError(
                f"{self.path} holds a run of {stored['epochs']} epochs, more than --epochs {config['epochs']}; "
                "give another --save_dir."
            )

    def read_last(self, config: dict[str, Any]) -> dict[str, Any]:
        """The content of last.pth, which must be whole and come from a run with this config."""
        try:
            state = read_checkpoint(self.last)
        except UserError as error:
            raise UserError(f"{error} Or start over with --resume never.") from error
        if "position" not in state:
            raise UserError(f"{self.last} is no checkpoint of a run; give another --save_dir.")
        self._compare(state["config"], config)
        position = state["position"]
        in_main = position["stage"] == len(position["stages"])
        trained = position["epoch"] - 1 if in_main else 0
        if trained > config["epochs"]:
            raise UserError(
                f"{self.path} has trained {trained} epochs, more than --epochs {config['epochs']}; give another --save_dir."
            )
        return state

    def started(self) -> bool:
        """Whether there is anything to go on from, or a result."""
        return self.last.is_file() or self.best.is_file()

    def stored_config(self) -> dict[str, Any] | None:
        """The config of the run in the directory; None where there is none, or where it was stopped before it saved."""
        if not self.config.is_file() or not self.started():
            return None
        try:
            content = parse_yaml(self.config.read_text())
        except TooMuch as error:
            raise UserError(f"{self.config} is no config of a run ({error}); copy it again.") from error
        except yaml.YAMLError:
            return None  # last.pth holds the config as well
        return content if isinstance(content, dict) else None

    def open(self, config: dict[str, Any]) -> None:
        """Create the directory, sweep out what a killed process left half-written, and write the config."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.weights):
            sweep(folder)
        write_text(self.config, yaml.safe_dump(config, sort_keys=False))

    def clear(self) -> None:
        """Forget an earlier run in the same directory; other files stay."""
        for file in (
            self.last,
            self.metrics,
            self.result,
            self.best,
            self.card,
            self.config,
            self.path / "analysis.json",
            self.path / "cka.png",
            self.path / "evidence.json",
            self.path / "compatibility.json",
            *self.path.glob("peer*.pth"),
        ):
            file.unlink(missing_ok=True)
        remove_record(self.weights)

    def discard_unstarted(self) -> None:
        """Remove what a run wrote that was refused before its first checkpoint; files of others stay."""
        if self.started() or not self.path.is_dir():
            return
        for file in (self.config, self.metrics, self.path / ".lock"):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        remove_record(self.weights)
        with contextlib.suppress(OSError):  # not empty: someone else's files
            self.path.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one process, also while others decode images for it; a second one is refused."""
        self.path.mkdir(parents=True, exist_ok=True)
        refusal = f"another process is writing {self.path}; wait for it or give another {self.flag}."
        with alone(self.path, refusal, self.path / ".lock"):
            yield

    def finished(self, epochs: int) -> str | None:
        """The text of result.txt where the run has reached this many epochs, else None.

        card.json is written last: where it names the epochs, everything else is there.
        """
        if not (self.result.is_file() and self.best.is_file() and self.card.is_file()):
            return None
        return self.result.read_text().rstrip() if self.card_content().get("epochs", 0) >= epochs else None

    def card_content(self) -> dict[str, Any]:
        try:
            content = parse_json(self.card.read_text())
        except json.JSONDecodeError:
            return {}
        return content if isinstance(content, dict) else {}

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line for an epoch and flush it to the disk."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line that a crash cut short is left out."""
        records = []
        if self.metrics.is_file():
            for line in self.metrics.read_text().splitlines():
                try:
                    records.append(parse_json(line))
                except json.JSONDecodeError:
                    break
        return records

    def cut_history(self, epochs: int) -> None:
        """Keep the lines of the first ``epochs`` epochs, over all stages: later ones will run again."""
        kept = self.history()[:epochs]
        if self.metrics.is_file():
            write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
