"""`metric-kd compare FILE.yaml`: methods x weights x seeds under one budget, resumable, as one table.

The file is described in :mod:`metric_kd.cli.comparison`. Runs lie in save_dir/ROW/seedK, those that choose a weight in
save_dir/ROW/weight-W/seedK; finished ones are not run again. Results: table.txt, results.json, comparison.png and
comparison.html in save_dir. Exit status 1 where a row failed.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metric_kd.cli.comparison import CONTROL, Comparison, Row, main_metric, read_comparison, with_own_cache
from metric_kd.cli.config import DistillConfig, to_dict
from metric_kd.cli.fitting import fit, say
from metric_kd.cli.making import make_task
from metric_kd.cli.outcome import FILES, Outcome, Result, report_of, write_results, written_in
from metric_kd.cli.parse import Parsed, read_words
from metric_kd.cli.plugins import add_plugins
from metric_kd.cli.session import Session, build
from metric_kd.engine.checkpoint import write_text
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.errors import UserError
from metric_kd.plain import parse_json
from metric_kd.report.comparison import table_text
from metric_kd.report.words import duration


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare runs one network after the other in one process; start it without torchrun.")
    comparison = read_comparison(Path(options.file), options.plugins)
    _check_folder(comparison)
    _rehearse(comparison, options.dry_run)
    if options.dry_run:
        print("\n".join(_plan(comparison)))
        return 0
    with RunDirectory(comparison.save_dir).locked():
        outcomes = _run_all(comparison)
        report = report_of(comparison, outcomes, _control_words(comparison))
        files = write_results(comparison, outcomes, report)
    say(f"\n{table_text(report)}\nwrote {', '.join(map(str, files))}")
    return 1 if any(outcome.failure for outcome in outcomes) else 0


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("file", type=str, help="YAML file of the comparison, as examples/cifar_zoo.yaml")
    parser.add_argument("--dry_run", action="store_true", help="check everything, print rows and runs, run nothing")
    add_plugins(parser)
    return parser


def _run_all(comparison: Comparison) -> list[Outcome]:
    """Alone and the reference first, for the control needs their times; then the control and the other methods."""
    reference = comparison.reference
    others = [row for row in comparison.methods.values() if row is not reference]
    done = {row.name: _run_row(comparison, row) for row in (comparison.alone, reference)}
    done[CONTROL] = _run_control(comparison, done[comparison.alone.name], done[reference.name])
    done |= {row.name: _run_row(comparison, row) for row in others}
    return [done[name] for name in (comparison.alone.name, CONTROL, *comparison.methods)]


def _run_row(comparison: Comparison, row: Row) -> Outcome:
    """All runs of a row; a ``UserError`` ends it and is its result, so that the other rows go on."""
    outcome = Outcome(row, next(iter(row.candidates)))
    try:
        if len(row.candidates) > 1:
            _choose(comparison, outcome)
        for seed in comparison.seeds:
            outcome.runs[seed] = _run(row, comparison.final(row, outcome.weight, seed))
    except UserError as error:
        outcome.failure = _advice(row, str(error))
        say(f"{row.name} failed: {error}")
    return outcome


def _advice(row: Row, sentence: str) -> str:
    """A diverged run is not mended by the flags that its own sentence names: all rows share them."""
    what, diverged, _ = sentence.partition(" was not finite")
    if not diverged:
        return sentence
    return f"{what} was not finite; give {row.name} a smaller weight and remove its folder in save_dir."


def _choose(comparison: Comparison, outcome: Outcome) -> None:
    """Take the weight that is best on held-out training data, the first of equals. Test results are not looked at."""
    row = outcome.row
    for weight in row.candidates:
        try:
            values = [_held_out(row, parsed) for parsed in comparison.searches(row, weight)]
            outcome.held_out[weight] = sum(values) / len(values)
        except UserError as error:
            outcome.refused[weight] = str(error)
    if not outcome.held_out:
        raise UserError(f"no weight could be trained; {next(iter(outcome.refused.values()))}")
    outcome.weight = max(outcome.held_out, key=lambda weight: outcome.held_out[weight])


def _held_out(row: Row, parsed: Parsed) -> float:
    """The best of the epochs on the held-out part of the training data."""
    _run(row, parsed)
    key = f"val_{main_metric(parsed.config)[0]}"
    return max(record[key] for record in _directory(parsed).history() if key in record)


def _run(row: Row, parsed: Parsed) -> Result:
    """The result of a run, which is not repeated where it is finished."""
    _check_stored(parsed)
    run = _directory(parsed)
    if run.finished(parsed.config.epochs) is None:
        say(f"\n{row.name}: {run.path}")
        fit(row.command, parsed)
    card = run.card_content()
    seconds = sum(record["seconds"] for record in run.history())
    return Result(str(run.path), card["metrics"]["final"], seconds, card["environment"])


def _directory(parsed: Parsed) -> RunDirectory:
    assert parsed.config.save_dir is not None
    return RunDirectory(parsed.config.save_dir)


def _check_stored(parsed: Parsed) -> None:
    """Refuse a folder that holds a run with another config, or of another length."""
    run, config = _directory(parsed), to_dict(parsed.config)
    run.check_config(config)
    epochs = (run.stored_config() or config)["epochs"]
    if epochs != config["epochs"]:
        raise UserError(
            f"{run.path} holds a run of {epochs} epochs and the comparison asks for {config['epochs']}; give another "
            "save_dir, or delete that folder to repeat the run."
        )


def _run_control(comparison: Comparison, alone: Outcome, reference: Outcome) -> Outcome:
    if _control_epochs(comparison) is None:
        for outcome in (alone, reference):
            if outcome.failure:
                missing = f"{outcome.row.name} failed, so there is no time to match; give control_epochs."
                return Outcome(comparison.control(comparison.alone.only.config.epochs), failure=missing)
        _measure_control(comparison, alone, reference)
    epochs = _control_epochs(comparison)
    assert epochs is not None
    return _run_row(comparison, comparison.control(epochs))


def _measure_control(comparison: Comparison, alone: Outcome, reference: Outcome) -> None:
    """Store how many epochs alone take the time of a run of the reference, so that a resumed comparison keeps it."""
    assert alone.seconds is not None and reference.seconds is not None
    epochs = comparison.alone.only.config.epochs
    measured = {
        "control_epochs": max(epochs, round(epochs * reference.seconds / alone.seconds)),
        "reference": reference.row.name,
        "seconds_of_reference": reference.seconds,
        "seconds_per_epoch_alone": alone.seconds / epochs,
    }
    file = written_in(comparison.save_dir).claim(comparison.save_dir / "plan.json")
    write_text(file, json.dumps(measured, indent=2) + "\n")


def _measured(comparison: Comparison) -> dict[str, Any]:
    file = comparison.save_dir / "plan.json"
    return parse_json(file.read_text()) if file.is_file() else {}


def _control_epochs(comparison: Comparison) -> int | None:
    """As given, as measured earlier, or not known yet."""
    given = comparison.control_epochs
    return given if given is not None else _measured(comparison).get("control_epochs")


def _control_words(comparison: Comparison) -> str:
    epochs, measured = _control_epochs(comparison), _measured(comparison)
    if comparison.control_epochs is not None:
        return f"the student alone for {epochs} epochs, as the file says"
    if not measured:
        return f"the student alone, for as long as one run of {comparison.reference.name} takes"
    return (
        f"the student alone for {epochs} epochs, about the time of one run of {measured['reference']} "
        f"({duration(measured['seconds_of_reference'])}; an epoch alone {duration(measured['seconds_per_epoch_alone'])})"
    )


def _known_rows(comparison: Comparison) -> list[Row]:
    epochs = _control_epochs(comparison)
    control = [] if epochs is None else [comparison.control(epochs)]
    return [comparison.alone, *control, *comparison.methods.values()]


def _check_folder(comparison: Comparison) -> None:
    """What lies in save_dir belongs to this comparison, as far as its runs are known before any has been made."""
    folder = RunDirectory(comparison.save_dir)
    folder.check_writable()
    if folder.started():
        raise UserError(f"save_dir {folder.path} holds a run of its own; give another folder.")
    written_in(folder.path).check([*FILES, "plan.json"])
    for row in _known_rows(comparison):
        runs = [*_searches(comparison, row)]
        if len(row.candidates) == 1:
            runs += [comparison.final(row, weight, seed) for weight in row.candidates for seed in comparison.seeds]
        for parsed in runs:
            _check_stored(parsed)


def _searches(comparison: Comparison, row: Row) -> Iterator[Parsed]:
    """The runs that choose among the weights of a row; none where it has one."""
    for weight in row.candidates if len(row.candidates) > 1 else ():
        yield from comparison.searches(row, weight)


def _finished(comparison: Comparison, row: Row) -> tuple[int, int]:
    """(finished runs that choose a weight, finished runs of the table)."""
    runs = [*_searches(comparison, row)]
    finals = [comparison.final(row, next(iter(row.candidates)), seed) for seed in comparison.seeds]
    counts = [sum(_directory(p).finished(p.config.epochs) is not None for p in part) for part in (runs, finals)]
    return counts[0], counts[1]


def _plan(comparison: Comparison) -> list[str]:
    """The rows, their runs, and what is finished of them."""
    lines = []
    for row in _known_rows(comparison):
        searched, finished = _finished(comparison, row)
        runs = f"{len(comparison.seeds)} runs of {row.only.config.epochs} epochs ({finished} finished)"
        search = len([*_searches(comparison, row)])
        if search:
            words = (
                f"{search} runs to choose among weights {', '.join(row.candidates)} ({searched} finished), then {runs}"
            )
        else:
            words = f"{runs}: {', '.join(row.only.config.loss or [])}"
        lines.append(f"{row.name}: {words}")
    if _control_epochs(comparison) is None:
        lines.insert(1, f"{CONTROL}: {len(comparison.seeds)} runs; {_control_words(comparison)}")
    return [*lines, f"nothing was run; the results would lie in {comparison.save_dir}"]


def _rehearse(comparison: Comparison, trial: bool) -> None:
    """Load the data and build what is still to run, so that nothing is refused after hours; writes nothing but, unless this
    is all (``trial``), a pack.

    Rows share what is loaded, but for those with peers or coders of their own.
    """
    rows = [
        row
        for row in (*comparison.methods.values(), comparison.alone)
        if _finished(comparison, row) != (len([*_searches(comparison, row)]), len(comparison.seeds))
    ]
    select: Any = "val" if any(len(row.candidates) > 1 for row in rows) else "last"
    sessions: dict[tuple[str | None, ...], Session] = {}
    try:
        for row in rows:
            config = with_own_cache(replace(row.only.config, save_dir=None, student_init=None, select=select))
            # A dry run checks a teacher's cache where there is one, and makes none; nor a pack.
            config = replace(config, dry_run=trial or getattr(config, "teacher_cache", None) is not None)
            teaches = isinstance(config, DistillConfig)
            networks: tuple[str | None, ...] = (None, None, None)
            if isinstance(config, DistillConfig):
                networks = (*config.mutual, config.granularity, config.granularity_load, config.teacher_cache)
            if networks not in sessions:
                sessions[networks] = build(Parsed(config, row.only.given))
            session = replace(sessions[networks], config=config)
            try:
                make_task(session if teaches else replace(session, teacher=None))
            except UserError as error:
                raise UserError(f"{row.name}: {error}") from error
    finally:
        for session in sessions.values():
            session.close()
