"""`run.py --mode eval` and `metric-kd eval RUN`: Recall@K of a checkpoint on unseen classes; writes nothing."""

from collections.abc import Sequence

from metric_kd.cli.parse import Parsed, parse
from metric_kd.cli.session import build, checked, make_evaluate, run_of


def main(arguments: Sequence[str], program: str | None = None) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--load", *arguments]
    evaluate(parse("train", ["--mode", "eval", *arguments], program or "metric-kd eval"))
    return 0


def selected_on_test(load: str | None) -> bool:
    """Whether the network comes from a run that chose its best epoch by looking at the test classes."""
    return load is not None and (run_of(load).stored_config() or {}).get("select") == "test"


def evaluate(parsed: Parsed) -> dict[str, float]:
    """Print and return {"recall@K": fraction} of the network in --load."""
    session = build(checked(parsed))
    for note in (
        *session.notes,
        f"{session.config.load} on {session.config.dataset} ({len(session.test.records)} images)",
    ):
        print(note)
    try:
        metrics = make_evaluate(session, session.test)(session.student)
    finally:
        session.close()
    suffix = " (selected on test)" if selected_on_test(session.config.load) else ""
    for k in session.config.recall:
        print(f"Recall@{k}: {100 * metrics[f'recall@{k}']:.4f}{suffix}")
    return metrics
