"""`metric-kd granularity`: fit the coders of a teacher, which run_distill.py --granularity needs."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import dry_run
from metric_kd.cli.fitting import fit
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    parsed = parse("granularity", arguments, program)
    if parsed.config.dry_run:
        dry_run("granularity", arguments)
    else:
        fit("granularity", parsed)
    return 0
