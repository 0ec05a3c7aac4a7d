"""What `metric-kd report` knows of runs: which are finished, what they achieve, what they cost, and who taught them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metric_kd.cli.asymmetric import PREFIX
from metric_kd.cli.config import COMMANDS
from metric_kd.cli.nested import BYTES, key_of
from metric_kd.cli.stored import run_of
from metric_kd.engine.checkpoint import find_checkpoint
from metric_kd.engine.run_directory import SEED_KEYS, RunDirectory
from metric_kd.errors import UserError
from metric_kd.evaluation.metrics import titles
from metric_kd.report.measured import Recipe

MEASURED = ("recall@", "top")
"""How the metrics begin that a report can show."""
OWN = ("folder", "table")
"""Data sets that are the user's."""
MACHINE = ("metric_kd", "python", "torch", "numpy", "device", "threads", "processes", "kernels", "search")
"""What of a run's environment is shown."""


REIDENTIFICATION = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP"}


@dataclass(frozen=True)
class Finished:
    """A run that has reached its last epoch: its directory, its config.yaml and its card.json."""

    run: RunDirectory
    config: dict[str, Any]
    card: dict[str, Any]

    @property
    def classifies(self) -> bool:
        return self.config.get("task") == "classification"

    @property
    def file(self) -> Path:
        return find_checkpoint(self.run.path).resolve()

    @property
    def tested_on(self) -> str:
        """The fingerprint of the test images."""
        return str(self.card["data"]["fingerprint"][1])

    @property
    def data(self) -> str:
        """What to call the data set; one of the user's own has the name of its folder or file."""
        name, own = str(self.config["dataset"]), self.config.get("data")
        return f"{Path(own).resolve().name} ({name})" if name in OWN and own else name

    @property
    def teacher(self) -> str | None:
        return self.config.get("teacher_load")


def finished(path: str) -> Finished:
    """A run that a report can show. Raises ``UserError`` where there is none, where it has not come to its end, or where it
    was for something else than Recall or accuracy.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist; give the folder of a run (--save_dir).")
    run = run_of(path)
    config = run.stored_config()
    if config is None:
        raise UserError(f"{path} is no run of this program; give the folder that one was trained into (--save_dir).")
    if run.finished(config["epochs"]) is None:
        done = sum("stage" not in record for record in run.history())
        raise UserError(
            f"{path} has not come to its end ({done} of {config['epochs']} epochs); start its command again, which goes on, "
            "or leave it out."
        )
    card = run.card_content()
    metrics = card["metrics"]["best"]
    if not any(key.startswith(MEASURED) for key in metrics):
        raise UserError(
            f"{path} was measured by {', '.join(metrics)}, which is neither Recall nor accuracy; leave it out."
        )
    return Finished(run, config, card)


def names_of(paths: Sequence[Path]) -> list[str]:
    """What to call runs: the last part of their path, or as many as tell all of them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same run is named twice; name it once.")


def recipe_of(found: Finished) -> Recipe:
    config, card = found.config, found.card
    images, classes = card["data"]["train"]
    content = {k: v for k, v in config.items() if k not in SEED_KEYS}
    return Recipe(
        losses=tuple(card["losses"]),
        epochs=card["epochs"],
        seed=card["seed"],
        trained_on=f"{images:,} images of {classes:,} classes",
        fingerprint=str(card["data"]["fingerprint"][0]),
        selection=f"the result is {_the(card['selection'])}",
        family=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        settings=_settings(config),
        environment={k: str(v) for k, v in card["environment"].items() if k in MACHINE},
    )


def accuracies(found: Finished) -> dict[str, float]:
    """{Top-k accuracy: fraction} as the run measured it."""
    metrics = found.card["metrics"]["best"]
    return {
        f"Top-{key[3:]} accuracy": value for key, value in metrics.items() if key[3:].isdecimal() and key[:3] == "top"
    }


def further_metrics(found: Finished) -> dict[str, float]:
    """{name for people: fraction} of what the run measured beside Recall@K of its embedding on its test images."""
    metrics, known = found.card["metrics"]["best"], {**REIDENTIFICATION, **nested_keys_of(found.config)}
    rest = {key: value for key, value in metrics.items() if not re.fullmatch(r"recall@\d+", key)}
    named = {known.get(key) or _title(key): value for key, value in rest.items()}
    elsewhere = {
        f"Recall@{key.removeprefix('recall@')} on {entry}": value
        for entry, values in (found.card.get("also") or {}).items()
        for key, value in values.items()
    }
    return {**named, **elsewhere}


def nested_keys_of(config: dict[str, Any]) -> dict[str, str]:
    """Metric of a prefix of --nested -> its name, with what a vector then takes in float32."""
    if not config.get("nested"):
        return {}
    lengths = [int(part) for part in str(config["nested"]).split(",")]
    return {
        key_of(f"recall@{k}", length): f"Recall@{k} of the first {length} numbers ({BYTES * length} bytes)"
        for length in lengths
        for k in config.get("recall", [1])
    }


def _title(key: str) -> str:
    if key.startswith(f"{PREFIX}recall@"):
        return f"Recall@{key.partition('@')[2]} in the teacher's gallery"
    try:
        return titles([key])[key]
    except UserError:
        return key


def _the(selection: str) -> str:
    return f"the {selection}" if selection.startswith("last") else selection


def _settings(config: dict[str, Any]) -> dict[str, str]:
    """{flag: value} where a run departs from the defaults, as config.yaml writes values."""
    known = COMMANDS["distill" if "teacher_load" in config else "train"]()
    changed = {key: value for key, value in config.items() if value != getattr(known, key, None)}
    return {key: _plain(value) for key, value in changed.items() if key not in ("save_dir", "resume")}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else yaml.safe_dump(value).strip().removesuffix("\n...")
