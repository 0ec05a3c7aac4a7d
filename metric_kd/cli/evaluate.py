"""`run.py --mode eval` and `metric-kd eval RUN`: what a checkpoint achieves on the test images; writes nothing."""

from collections.abc import Sequence

from metric_kd import distributed
from metric_kd.cli.parse import Parsed, parse, run_as_flag
from metric_kd.cli.session import build, checked
from metric_kd.cli.stored import run_of


def main(arguments: Sequence[str], program: str | None = None) -> int:
    evaluate(parse("train", ["--mode", "eval", *run_as_flag(arguments)], program or "metric-kd eval"))
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
    finally:
        session.close()
    metrics = distributed.from_main(metrics)
    suffix = " (selected on test)" if selected_on_test(session.config.load) else ""
    for key, title in session.metrics.items():
        if distributed.is_main():
            print(f"{title}: {100 * metrics[key]:.4f}{suffix}")
    return metrics
