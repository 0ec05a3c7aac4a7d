"""run_distill.py and `metric-kd distill`: distil a teacher into a student."""

from collections.abc import Sequence

from metric_kd.cli.dry_run import fit_or_try
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    return fit_or_try("distill", arguments, parse("distill", arguments, program))
