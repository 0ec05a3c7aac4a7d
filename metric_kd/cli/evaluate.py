"""`run.py --mode eval` and `metric-kd eval RUN`: Recall@K of a checkpoint on unseen classes; writes nothing."""

from collections.abc import Sequence

from metric_kd.cli.parse import Parsed, parse
from metric_kd.cli.session import build, checked, make_evaluate


def main(arguments: Sequence[str], program: str | None = None) -> int:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--load", *arguments]
    evaluate(parse("train", ["--mode", "eval", *arguments], program or "metric-kd eval"))
    return 0


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
    for k in session.config.recall:
        print(f"Recall@{k}: {100 * metrics[f'recall@{k}']:.4f}")
    return metrics
