"""What `metric-kd compare` compares: its YAML file, checked, and the runs that it stands for.

    save_dir: runs/compare-cifar100
    seeds: [0, 1, 2]
    common: {task: classification, dataset: cifar100, base: resnet20, teacher_load: runs/teacher}
    methods:
      st: [cross_entropy:1, "st:0.1,temperature=4"]
      at: {loss: [cross_entropy:1, "at:{weight}"], weights: [100, 1000]}
      dml: {loss: [cross_entropy:1, dml:1], mutual: [resnet110]}

- ``common``: flags of run_distill.py for all rows, and ``preset``. What a comparison is about (losses, seeds, folders,
  selection, starts) is not among them.
  Of ``teacher_cache: FILE`` come FILE-val, for runs on fewer images, and FILE-logits, for losses that read them.
- ``methods``: row -> its losses; or a map of ``loss``, ``weights`` (each stands for ``{weight}`` in the losses, the best
  on held-out training data is taken) and ``mutual`` (peers that are trained along, instead of a teacher).
- ``alone``: losses of the student without a teacher; default cross_entropy, for embeddings l2_triplet.
- ``control_epochs``: epochs of row ``control``, the student alone for longer; default as many as fit into the time of
  one run of ``st``, or of the first method where there is no ``st``.
- ``search_seeds``: seeds of the runs that choose a weight; default the first of ``seeds``.
"""

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from metric_kd.cli.config import DistillConfig, RunConfig, TrainConfig, known_keys
from metric_kd.cli.goals import goal_of
from metric_kd.cli.losses import losses_of
from metric_kd.cli.parse import Parsed, parse
from metric_kd.cli.session import checked
from metric_kd.cli.trust import in_a_run
from metric_kd.engine.optimisation import milestone
from metric_kd.engine.run_plugins import check_named, plugins_of, unnamed
from metric_kd.errors import UserError, one_of
from metric_kd.losses.objective import Objective
from metric_kd.plain import parse_yaml

KEYS = ["save_dir", "seeds", "search_seeds", "common", "alone", "control_epochs", "methods"]
METHOD_KEYS = ["loss", "weights", "mutual"]
ALONE, CONTROL, REFERENCE = "alone", "control", "st"
WEIGHT = "{weight}"

_LOSSES = "losses stand under alone and methods, as name:weight,option=value"
_RATIOS = ("triplet", "dist", "angle", "dark", "at", "fitnet")
_OURS = {
    "loss": _LOSSES,
    **{f"{name}_ratio": _LOSSES for name in _RATIOS},
    "dark_alpha": _LOSSES,
    "dark_beta": _LOSSES,
    "mutual": "give it to a method, as in dml: {loss: [cross_entropy:1, dml:1], mutual: [resnet20]}",
    "seed": "list them under seeds",
    "save_dir": "it stands beside common, and every run has a folder in it",
    "student_init": "all students of a seed start from one file in save_dir",
    "load": "all students of a seed start from one file in save_dir; weights to start from can be given as pretrained",
    "select": "weights are chosen on held-out training data, results are those of the last epoch",
    "unlabelled": "the student is trained alone too, and that takes labels",
    "resume": "finished runs are skipped and others go on; delete a run's folder to repeat it",
    "dry_run": "it is a flag of the command",
}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    candidates: weight as written ("" where there is none to choose) -> checked config of its runs, but for seed, folder
    and selection.
    """

    name: str
    command: str
    candidates: dict[str, Parsed]

    @property
    def only(self) -> Parsed:
        """The config of a row that has one candidate, or the first of several."""
        return next(iter(self.candidates.values()))


@dataclass(frozen=True)
class Comparison:
    """A checked comparison; ``alone`` and ``methods`` are its rows, :meth:`control` needs a number of epochs."""

    save_dir: Path
    seeds: list[int]
    search_seeds: list[int]
    control_epochs: int | None
    alone: Row
    methods: dict[str, Row]

    @property
    def reference(self) -> Row:
        """The method whose time the control is given."""
        return self.methods.get(REFERENCE) or next(iter(self.methods.values()))

    def control(self, epochs: int) -> Row:
        """The student alone for that many epochs, its schedule stretched to them."""
        config, given = self.alone.only
        stretched = [milestone((at - 1) / config.epochs, epochs) for at in config.lr_decay_epochs]
        return Row(CONTROL, "train", {"": Parsed(replace(config, epochs=epochs, lr_decay_epochs=stretched), given)})

    def final(self, row: Row, weight: str, seed: int) -> Parsed:
        """A run of the table: all training data, the network of the last epoch."""
        return self._run(row, weight, seed, self.save_dir / row.name / f"seed{seed}", "last")

    def searches(self, row: Row, weight: str) -> list[Parsed]:
        """The runs that judge a weight on held-out training data."""
        folder = self.save_dir / row.name / f"weight-{weight}"
        return [self._run(row, weight, seed, folder / f"seed{seed}", "val") for seed in self.search_seeds]

    def _run(self, row: Row, weight: str, seed: int, folder: Path, select: Any) -> Parsed:
        config, given = row.candidates[weight]
        start = str(self.save_dir / f"init-seed{seed}.pth")
        run = replace(config, seed=seed, save_dir=str(folder), student_init=start, select=select)
        return Parsed(with_own_cache(run), given)


def with_own_cache(config: RunConfig) -> RunConfig:
    """A checked config with a --teacher_cache that serves it: rows share the file that ``common`` names where they can.

    Weights are judged by runs on fewer images (FILE-val), and some losses read the teacher's logits (FILE-logits).
    """
    if not isinstance(config, DistillConfig) or config.teacher_cache is None:
        return config
    file = Path(config.teacher_cache)
    suffix = "-val" if config.select == "val" else ""
    suffix += "-logits" if "logits" in Objective(losses_of(config)).all_needs[1] else ""
    return replace(config, teacher_cache=str(file.with_name(f"{file.stem}{suffix}{file.suffix}")))


def main_metric(config: RunConfig) -> tuple[str, str]:
    """(key, title) of what rows are compared by: the first K of --recall or --top."""
    config = replace(config, top=config.top or [1])
    return next(iter(goal_of(config).keys(config).items()))


def read_comparison(path: Path, plugins: Sequence[str] = ()) -> Comparison:
    """The comparison that a file describes, every row's config checked as its own command would check it.

    plugins: those named on the command line, beside those of a file of the user's own. Raises ``UserError`` with the first
    thing that is wrong; reads no data.
    """
    content = _content(path)
    save_dir = content.get("save_dir")
    if not isinstance(save_dir, str) or not save_dir:
        raise UserError(f"{path} names no folder for the results; give save_dir: runs/NAME.")
    seeds = _seeds(content.get("seeds"), "seeds")
    search = _seeds(content["search_seeds"], "search_seeds") if content.get("search_seeds") is not None else seeds[:1]
    common, methods = _common(content.get("common")), _methods(content.get("methods"))
    if common.get("teacher_load") is None and not all(method.get("mutual") for method in methods.values()):
        raise UserError("common names no teacher; give teacher_load: RUN_OR_FILE (run.py trains one).")
    common = _with_plugins(path, common, plugins)
    alone = _row(ALONE, common, {"loss": content.get("alone")}, save_dir)
    epochs = content.get("control_epochs")
    if epochs is not None and (not isinstance(epochs, int) or epochs < alone.only.config.epochs):
        raise UserError(
            f"control_epochs is {epochs!r}; give {alone.only.config.epochs} (the epochs of the others) or more, or leave "
            "it out to have it measured."
        )
    rows = {name: _row(name, common, method, save_dir) for name, method in methods.items()}
    return Comparison(Path(save_dir), seeds, search, epochs, alone, rows)


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a YAML file, as examples/cifar_zoo.yaml.")
    try:
        content = parse_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML ({str(error).splitlines()[0]}); mend it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a map of {', '.join(KEYS)}.")
    for key in content:
        if key not in KEYS:
            raise one_of(f"key in {path}:", str(key), KEYS)
    return content


def _with_plugins(path: Path, common: dict[str, Any], named: Sequence[str]) -> dict[str, Any]:
    """The user's plugins; a file in the folder of a run has none of its own."""
    if in_a_run(path):
        check_named(path.parent, common, named)
        return {**common, "plugins": list(named)}
    return {**common, "plugins": [*plugins_of(common), *unnamed(named, plugins_of(common))]}


def _seeds(value: Any, key: str) -> list[int]:
    numbers = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not numbers or not value or min(value) < 0:
        raise UserError(f"{key} is {value!r}; give a list of whole numbers of 0 or more, as in {key}: [0, 1, 2].")
    if len(set(value)) < len(value):
        raise UserError(
            f"{key} names {max(value, key=value.count)} twice; the same seed gives the same run, name it once."
        )
    return list(value)


def _common(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError("common must be a map of run_distill.py's flags to values, as in common: {dataset: cifar100}.")
    common = {str(key).replace("-", "_"): entry for key, entry in value.items()}
    known = [key for key in ("preset", *known_keys("distill")) if key not in _OURS]
    for key in common:
        if key in _OURS:
            raise UserError(f"common must not hold {key}: {_OURS[key]}.")
        if key not in known:
            raise one_of("key in common:", key, known)
    return common


def _methods(value: Any) -> dict[str, dict[str, Any]]:
    """Row -> {loss, weights, mutual}; every entry has the right shape, its losses are not yet read."""
    if not isinstance(value, dict) or not value:
        raise UserError('methods must be a map of names to losses, as in methods: {st: ["cross_entropy:1", "st:0.1"]}.')
    found = {}
    for name, entry in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_+-]+", name):
            raise UserError(f"method {name!r} becomes a folder; name it with letters, digits, _, + and - only.")
        if name in (ALONE, CONTROL):
            raise UserError(f"method {name!r} has the name of the row without a teacher; choose another name.")
        method = entry if isinstance(entry, dict) else {"loss": entry}
        for key in method:
            if key not in METHOD_KEYS:
                raise one_of(f"key of method {name!r}:", str(key), METHOD_KEYS)
        if not isinstance(method.get("loss"), list) or not method["loss"]:
            raise UserError(f'method {name!r} needs a list of losses, as in {name}: ["cross_entropy:1", "st:0.1"].')
        found[name] = method
    return found


def _row(name: str, common: dict[str, Any], method: dict[str, Any], save_dir: str) -> Row:
    try:
        weights = _weights(method.get("weights"), method.get("loss"))
        candidates = {w: _checked(name, common, method, w, save_dir) for w in weights}
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return Row(name, "train" if name == ALONE else "distill", candidates)


def _weights(values: Any, losses: Any) -> list[str]:
    """The weights as a loss spells them; [""] where there is none to choose."""
    asked = WEIGHT in str(losses)
    if values is None and not asked:
        return [""]
    if values is None:
        raise UserError(f"the losses hold {WEIGHT}; list weights: [...] to choose from, or write a number.")
    try:
        numbers = [float(value) for value in values if not isinstance(value, bool)]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or len(numbers) < len(values) or not all(0 < number < math.inf for number in numbers):
        raise UserError(f"weights is {values!r}; give a list of positive numbers, as in weights: [100, 1000].")
    if len(set(numbers)) < len(numbers):
        raise UserError(f"weights {values!r} names one twice; name it once.")
    if not asked:
        raise UserError(f"there are weights to choose from, but no loss that takes one; write it as name:{WEIGHT}.")
    return [repr(number).removesuffix(".0") for number in numbers]


def _checked(name: str, common: dict[str, Any], method: dict[str, Any], weight: str, save_dir: str) -> Parsed:
    """The config of a row's runs. Flags that only distilling has mean nothing to the row without a teacher."""
    values, peers = dict(common), method.get("mutual")
    if peers:
        values = {key: value for key, value in values.items() if not key.startswith("teacher_")} | {"mutual": peers}
    if method.get("loss") is not None:
        values["loss"] = _filled(method["loss"], weight)
    config, given = _parsed(values)
    if method.get("loss") is None:
        config = replace(config, loss=None)  # a preset may have some
    if name == ALONE:
        shared = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
        triplets = {key: getattr(config, f"triplet_{key}") for key in ("sample", "margin")}
        config, given = TrainConfig(**shared, **triplets), given & set(shared)
    folder = Path(save_dir)
    config = replace(config, save_dir=str(folder / name / "seed"), student_init=str(folder / "init-seed.pth"))
    return checked(Parsed(config, given))


def _parsed(values: dict[str, Any]) -> Parsed:
    """As `metric-kd distill --preset NAME --config FILE` reads them."""
    values = dict(values)
    preset, plugins = values.pop("preset", None), values.pop("plugins", [])
    words = [f"--plugins={plugin}" for plugin in plugins] + ([] if preset is None else [f"--preset={preset}"])
    if "lr_decay_epochs" in values:  # else the shares of a preset would win over them
        values.setdefault("lr_decay_at", None)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        return parse("distill", [*words, f"--config={file.name}"])


def _filled(value: Any, weight: str) -> Any:
    """The same losses with the weight in its place."""
    if isinstance(value, str):
        return value.replace(WEIGHT, weight)
    if isinstance(value, dict):
        return {key: _filled(entry, weight) for key, entry in value.items()}
    return [_filled(entry, weight) for entry in value] if isinstance(value, list) else value
