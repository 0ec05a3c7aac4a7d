"""`metric-kd granularity`: fit the coders of a teacher, which run_distill.py --granularity needs."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import fit_or_try
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    return fit_or_try("granularity", arguments, parse("granularity", arguments, program))
