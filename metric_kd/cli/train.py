"""run.py and `metric-kd train`: train an embedding network, or evaluate one."""

from collections.abc import Sequence

from metric_kd.cli.config import TrainConfig
from metric_kd.cli.dry_run import dry_run
from metric_kd.cli.evaluate import evaluate
from metric_kd.cli.fitting import fit
from metric_kd.cli.parse import parse


def main(arguments: Sequence[str], program: str | None = None) -> int:
    parsed = parse("train", arguments, program)
    assert isinstance(parsed.config, TrainConfig)
    if parsed.config.mode == "eval":
        evaluate(parsed)
    elif parsed.config.dry_run:
        dry_run("train", arguments)
    else:
        fit("train", parsed)
    return 0
