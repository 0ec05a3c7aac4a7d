"""`metric-kd probe RUN`: train a linear classifier on the frozen backbone of a run, on another data set."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import fit_or_try
from metric_kd.cli.parse import parse, run_as_flag


def main(arguments: Sequence[str], program: str | None = None) -> int:
    arguments = run_as_flag(arguments)
    return fit_or_try("probe", arguments, parse("probe", arguments, program))
