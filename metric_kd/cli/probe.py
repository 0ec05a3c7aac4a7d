"""`metric-kd probe RUN`: train a linear classifier on the frozen backbone of a run, on another data set."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import dry_run
from metric_kd.cli.fitting import fit
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    arguments = as_flags(arguments)
    parsed = parse("probe", arguments, program)
    if parsed.config.dry_run:
        dry_run("probe", arguments)
    else:
        fit("probe", parsed)
    return 0


def as_flags(arguments: Sequence[str]) -> list[str]:
    """RUN, the first word, is --load RUN."""
    if arguments and not arguments[0].startswith("-"):
        return ["--load", *arguments]
    return list(arguments)
