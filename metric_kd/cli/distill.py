"""run_distill.py and `metric-kd distill`: distil a teacher's embedding into a student."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import dry_run
from metric_kd.cli.fitting import fit
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    parsed = parse("distill", arguments, program)
    if parsed.config.dry_run:
        dry_run("distill", arguments)
    else:
        fit("distill", parsed)
    return 0
