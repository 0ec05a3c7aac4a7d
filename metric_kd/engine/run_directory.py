"""One run, one directory: what lies in it, who may write it, and what a second start finds there."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from metric_kd.engine.checkpoint import read_checkpoint, write_text
from metric_kd.engine.older_run import is_output, names_in
from metric_kd.engine.written import MANIFEST, Written
from metric_kd.errors import UserError
from metric_kd.locks import alone
from metric_kd.plain import TooMuch, parse_json, parse_yaml
from metric_kd.scratch import is_plain, is_scratch, open_plain

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
NOTHING = frozenset(
    {
        ".DS_Store",
        ".localized",
        "Thumbs.db",
        "desktop.ini",
        ".directory",
        ".gitignore",
        ".gitkeep",
        ".keep",
        "lost+found",
    }
)
"""Names of which a folder is still empty: systems put them there, or people to keep an empty folder."""
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
    """The files of one run under ``path``; nothing is created before :meth:`open`.

    written: the files that runs and commands of ours wrote there, the only ones that are replaced or removed.
    """

    def __init__(self, path: "Path | str", flag: str = "--save_dir"):
        self.path, self.flag = Path(path), flag
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.txt"
        self.best = self.path / "best.pth"
        self.last = self.path / "last.pth"
        self.card = self.path / "card.json"
        self.weights = self.path / "weights"
        self.boards = self.path / "tensorboard"
        self.lock = self.path / ".lock"
        self.written = Written(self.path, lambda: names_in(self.path))
        self._made: list[Path] = []

    def best_of(self, network: str) -> Path:
        """Where the result of a network lies: best.pth for the student, NAME.pth for a peer."""
        return self.best if network == "student" else self.path / f"{network}.pth"

    def check_writable(self) -> None:
        """Raise ``UserError`` where the directory could not be written, leaving nothing behind."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.flag} {self.path} is a file; give a folder.")
        check_folder(self.path, self.flag)

    def check_own(self, networks: Iterable[str] = ()) -> None:
        """Raise ``UserError`` where the folder holds files and no run, or what a run cannot write without harm to others.

        networks: the peers of the student, which have files of their own.
        """
        names = self._content()
        if not names:
            return
        if not self.is_run():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{self.flag} {self.path} holds {names[0]}{more}, and no run; give another {self.flag}, a new or an empty "
                "folder."
            )
        files = [self.config, self.metrics, self.result, self.card, self.last, self.best]
        files += [self.best_of(network) for network in networks]
        self.written.check(file.name for file in files)
        self.written.check_folders([self.weights.name, self.boards.name])  # what lies in them may be of others

    def _content(self) -> list[str]:
        """What lies in the folder, but for what an empty folder has, or a process that was killed at its very start."""
        if not self.path.is_dir():
            return []
        names = {path.name for path in self.path.iterdir()} - NOTHING
        if self.lock.name in names and is_plain(self.lock) and self.lock.stat().st_size == 0:
            names.remove(self.lock.name)
        return sorted(name for name in names if not is_scratch(name, MANIFEST))

    def is_run(self) -> bool:
        """Whether the folder holds a run, started or finished, of this version or of one before manifests."""
        self.written.read()
        return self.config.name in self.written.names

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
        self.written.sweep()
        write_text(self.claim(self.config), yaml.safe_dump(config, sort_keys=False))

    def claim(self, file: Path) -> Path:
        """The file, put on the list of what we wrote; raises ``UserError`` where it is there and of somebody else."""
        return self.written.claim(file)

    def made(self, file: Path) -> None:
        """Put a file on the list of what we wrote, which is there already and whose name was not known before."""
        self.written.add([file.relative_to(self.path).as_posix()])

    def check_outputs(self, *names: str) -> None:
        """Raise ``UserError`` where a command could not write these files beside the run's without harm to others."""
        self.written.check(name for name in names if not is_output(self.path / name))

    def claim_output(self, name: str) -> Path:
        """The path of a command's file. Only a run has a list of its files; beside a mere checkpoint none is begun."""
        self.check_outputs(name)
        if self.is_run():
            self.written.add([name])
        return self.path / name

    def clear(self) -> None:
        """Forget an earlier run in the same directory; other files stay."""
        if self.is_run():
            self.written.remove(keep=[self.config.name])

    def discard_unstarted(self) -> None:
        """Remove what a run wrote that was refused before its first checkpoint; files of others stay."""
        if not self.path.is_dir():
            return
        if self.is_run():
            if self.started():
                return
            self.written.remove(keep=[self.config.name])
            if self._content() == [MANIFEST]:  # else a next start must still know the folder as a run's
                self.written.manifest.unlink()
        if is_plain(self.lock) and self.lock.stat().st_size == 0:
            self.lock.unlink()
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty: someone else's files
                folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one process, also while others decode images for it; a second one is refused."""
        self._made += [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        refusal = f"another process is writing {self.path}; wait for it or give another {self.flag}."
        with alone(self.path, refusal, self.lock):
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
        with open(self.claim(self.metrics), "a", opener=open_plain) as file:
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
            write_text(self.claim(self.metrics), "".join(json.dumps(record) + "\n" for record in kept))
