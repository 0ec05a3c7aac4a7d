"""`metric-kd eval RUN --against TEACHER`: can the student query the teacher's gallery?

Prints the matrix of whose queries find what in whose gallery and one sentence, and writes compatibility.json into the run's
directory.
"""

import json
from pathlib import Path

from metric_kd.cli.embedding import embedded, teacher_beside
from metric_kd.cli.parse import Parsed
from metric_kd.cli.session import Session, build, checked
from metric_kd.cli.stored import find_network, run_of
from metric_kd.deploy.bridge import KINDS, Bridge, bridge_from, fit_bridge
from metric_kd.distributed import announced
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint, write_text
from metric_kd.errors import UserError, one_of
from metric_kd.evaluation.compatibility import PAIRS, Matrix, chance, check_widths, compatibility, verdict
from metric_kd.evaluation.metrics import titles
from metric_kd.evaluation.retrieval import check_metrics
from metric_kd.models.network import Network

BRIDGES = ("auto", "none", *KINDS)


def matrix_of(parsed: Parsed, against: str, bridge: str) -> Matrix:
    """Print, store and return the matrix of the run in --load and the network ``against``.

    bridge: auto takes the one that is stored with the student, or where there is none and the widths differ fits a ridge;
    none takes none; ridge and procrustes are fitted on the training images.
    """
    if bridge not in BRIDGES:
        raise one_of("bridge", bridge, list(BRIDGES))
    load = parsed.config.load
    if load is None:
        raise UserError("--against compares a student with its teacher; name the student, as in metric-kd eval RUN.")
    if announced() > 1:
        raise UserError("--against works in one process; start it without torchrun.")
    find_network(against)
    parsed = checked(parsed)  # a run says itself what it was trained for
    if parsed.config.task == "classification":
        raise UserError(f"--against compares embeddings, and {load} is a classifier; name a run of embeddings.")
    run_of(load).check_outputs("compatibility.json")
    session = build(parsed)
    try:
        assert isinstance(session.student, Network)
        teacher = teacher_beside(session, against, run_of(load).stored_config() or {})
        if bridge == "none":
            check_widths(session.student.embedding_size, teacher.embedding_size)
        metrics = session.config.metrics or ["map@r"]
        check_metrics(metrics, session.test.records.labels, session.test.records.query, session.test.records.gallery)
        ours = embedded(session, session.student, name=load)
        theirs = embedded(session, teacher, name=against)
        used, how = _bridge(session, load, teacher, against, bridge)
        records, config = session.test.records, session.config
        found = compatibility(
            ours,
            theirs,
            config.recall,
            bridge=used,  # type: ignore[arg-type]  # mypy does not see __call__ of a NamedTuple
            unit=teacher.spec.l2normalize,
            query=records.query,
            gallery=records.gallery,
            metrics=metrics,
        )
    finally:
        session.close()
    names = {**{f"recall@{k}": f"Recall@{k}" for k in config.recall}, **titles(metrics)}
    first, title = next(iter(names.items()))
    nothing = chance(records.labels, config.recall[0], records.query, records.gallery)
    sentence = verdict(found, first, title, nothing)
    report = {"student": str(load), "teacher": str(against), "images": len(records), "bridge": how}
    path = run_of(load).claim_output("compatibility.json")
    write_text(path, json.dumps({**report, "matrix": found, "verdict": sentence}, indent=2) + "\n")
    print(f"{load} against {against} on {config.dataset} ({len(records)} images), bridge: {how}")
    print(table(found, names))
    print(sentence)
    print(f"wrote {path}")
    return found


def table(matrix: Matrix, names: dict[str, str]) -> str:
    """The matrix in percent, a row for each pair."""
    head = ["query - gallery", *names.values()]
    rows = [[pair, *(f"{100 * matrix[pair][key]:.2f}" for key in names)] for pair in PAIRS]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


def fitted(session: Session, student: Network, teacher: Network, kind: str) -> Bridge:
    """A bridge from the training images, each as a test shows it."""
    records = session.training
    assert records is not None
    ours, theirs = (embedded(session, network, records) for network in (student, teacher))
    return fit_bridge(ours.vectors, theirs.vectors, kind)


def _bridge(session: Session, load: str, teacher: Network, against: str, kind: str) -> tuple[Bridge | None, str]:
    assert isinstance(session.student, Network)
    stored = read_checkpoint(load).get("bridge")
    if kind == "none":
        return None, "none"
    if kind == "auto":
        if stored is not None and len(stored["shift"]) == teacher.embedding_size:  # else it leads to another teacher
            bridge = bridge_from(stored)
            return bridge, f"{bridge.kind}, stored with the student{_fitted_to_another(load, against)}"
        if session.student.embedding_size == teacher.embedding_size:
            return None, "none"
        kind = "ridge"
    bridge = fitted(session, session.student, teacher, kind)
    return bridge, f"{kind}, fitted on {len(session.training or ())} training images"


def _fitted_to_another(load: str, against: str) -> str:
    """Which teacher a stored bridge leads to, where that is not the one that is asked about."""
    taught = (run_of(load).stored_config() or {}).get("teacher_load")
    if (
        taught is None
        or Path(taught).exists()
        and find_checkpoint(taught).resolve() == find_checkpoint(against).resolve()
    ):
        return ""
    return f" for {taught} (--bridge ridge fits one to {against})"
