"""run.py and `metric-kd train`: train a network, or evaluate one."""

from collections.abc import Sequence

from metric_kd.cli.config import is_evaluation
from metric_kd.cli.dry_run import fit_or_try
from metric_kd.cli.evaluate import evaluate
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    parsed = parse("train", arguments, program)
    if is_evaluation(parsed.config):
        evaluate(parsed)
        return 0
    return fit_or_try("train", arguments, parsed)
