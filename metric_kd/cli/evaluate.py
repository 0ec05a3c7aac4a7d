"""`run.py --mode eval` and `metric-kd eval RUN`: what a checkpoint achieves on the test images; writes nothing.

With --against TEACHER and --bridge: whether it can query the teacher's gallery (:mod:`metric_kd.cli.against`).
"""

from collections.abc import Sequence

from metric_kd import distributed
from metric_kd.cli import also_eval
from metric_kd.cli.against import BRIDGES, matrix_of
from metric_kd.cli.nested import nested_keys, prefix_table
from metric_kd.cli.parse import Parsed, parse, run_as_flag
from metric_kd.cli.session import build, checked
from metric_kd.cli.stored import run_of
from metric_kd.errors import UserError

OWN = f"""flags of metric-kd eval alone:
  --against TEACHER     which of the two finds what in whose gallery, and whether the student can query the teacher's
  --bridge BRIDGE       with --against: {", ".join(BRIDGES)}; auto: the one that is kept with the student, or where there is
                        none and the widths differ a ridge, fitted on the training images (default: auto)

flags of run.py:
"""
"""What --help says before the flags of a run."""


def main(arguments: Sequence[str], program: str | None = None) -> int:
    if program is not None and {"-h", "--help"} & set(arguments):
        print(OWN)
    own, words = split_off(arguments, ("against", "bridge"))
    parsed = parse("train", ["--mode", "eval", *run_as_flag(words)], program or "metric-kd eval")
    if "against" in own:
        matrix_of(parsed, own["against"], own.get("bridge", "auto"))
    elif "bridge" in own:
        raise UserError("--bridge leads from a student to its teacher; name the teacher too, as in --against TEACHER.")
    else:
        evaluate(parsed)
    return 0


def selected_on_test(load: str | None) -> bool:
    """Whether the network comes from a run that chose its best epoch by looking at the test images."""
    return load is not None and (run_of(load).stored_config() or {}).get("select") == "test"


def evaluate(parsed: Parsed) -> dict[str, float]:
    """Print and return {metric: fraction} of the network in --load."""
    session = build(checked(parsed))
    for note in (
        *session.notes,
        f"{session.config.load} on {session.config.dataset} ({len(session.test.records)} images)",
    ):
        if distributed.is_main():
            print(note)
    try:
        metrics = session.goal.evaluate(session.config, session.device, session.test)(session.student)
        elsewhere = also_eval.measured(session.config, session.device, session.also, session.student)
    finally:
        session.close()
    metrics = distributed.from_main(metrics)
    suffix = " (selected on test)" if selected_on_test(session.config.load) else ""
    if distributed.is_main():
        own = nested_keys(session.config)  # in a table of their own
        lines = [
            f"{title}: {100 * metrics[key]:.4f}{suffix}" for key, title in session.metrics.items() if key not in own
        ]
        print("\n".join([*lines, *prefix_table(session.config, session.student, metrics)]))
        print("".join(f"{line}{suffix}\n" for line in also_eval.lines_of(elsewhere)), end="")
    return metrics


def split_off(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """({name: value} of the given flags, all other words); ``UserError`` for one without a value."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in (f"--{n}" for n in names):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value; see metric-kd eval --help.")
        found[name.removeprefix("--")] = value
    return found, rest
