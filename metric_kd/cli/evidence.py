"""`metric-kd evidence RUN [RUN ...] --against TEACHER`: how sure the figures of a student are, and what lies behind them.

Prints Recall@1 of both with 95% intervals, their paired difference, how alike they order the test images (without labels),
how they fill their spaces, and the classes on which the student is worst, best, and loses most; writes evidence.json into
every run's directory. Several runs are taken for seeds of one student, and merged.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, Literal

from metric_kd.cli.embedding import embedded, teacher_beside
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.cli.session import Session, build, measuring_of
from metric_kd.cli.stored import find_network, run_of
from metric_kd.engine.checkpoint import find_checkpoint, write_text
from metric_kd.engine.run_directory import SEED_KEYS
from metric_kd.errors import UserError
from metric_kd.evaluation.agreement import NEIGHBOURS
from metric_kd.evaluation.comparing import Sides, compare, merge
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.retrieval import check_ks, gallery_size
from metric_kd.models.network import Network
from metric_kd.report.evidence import evidence_text, merged_text


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    load_plugins(options.plugins)
    runs = list(options.runs)
    if len({find_checkpoint(run).resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice, which would make its figures look surer than they are; name each once.")
    if options.k < 1:
        raise UserError(f"--k is {options.k}; give 1 or more neighbours.")
    for run in runs:
        run_of(run).check_outputs("evidence.json")
    configs = [run_of(run).stored_config() or {} for run in runs]
    against = options.against or configs[0].get("teacher_load")
    if against is None:
        raise UserError(f"{runs[0]} was trained without a teacher; name a network, as in --against RUN_OR_FILE.")
    find_network(against)
    reports = _reports(options, runs, configs, against, program)
    notes = _unlike(configs)
    together = {"runs": runs, "notes": notes, **merge(reports)} if len(runs) > 1 else None
    for run, report in zip(runs, reports, strict=True):
        if together is not None:
            report["merged"] = together
        write_text(run_of(run).claim_output("evidence.json"), json.dumps(report, indent=2) + "\n")
    if options.json:
        print(json.dumps({"reports": reports}, indent=2))
        return 0
    for report in reports:
        print(evidence_text(report) + "\n")
    if together is not None:
        print(merged_text(together, reports) + "\n")
    print(f"wrote {', '.join(str(run_of(run).path / 'evidence.json') for run in runs)}")
    return 0


def _reports(
    options: Any, runs: Sequence[str], configs: Sequence[dict[str, Any]], against: str, program: str | None
) -> list[dict[str, Any]]:
    """What is found of each run beside the one teacher, which is asked once."""
    reports: list[dict[str, Any]] = []
    theirs: Embeddings | None = None
    seen = ""
    for run, config in zip(runs, configs, strict=True):
        session = _session(options, run, config, program)
        try:
            records = session.test.records
            check_ks([options.k], gallery_size(len(records), records.query, records.gallery))
            data = records.fingerprint()
            if theirs is None:
                teacher = teacher_beside(session, against, config)
                theirs, seen = embedded(session, teacher, name=against), data
            if data != seen:
                raise UserError(f"{run} has other test images than {runs[0]}; name runs of one data set and split.")
            assert isinstance(session.student, Network)
            sides = Sides(embedded(session, session.student, name=run), theirs, records.query, records.gallery)
            found = compare(sides, records.class_names, options.k)
        finally:
            session.close()
        reports.append({"student": run, "teacher": str(against), "dataset": session.config.dataset, **found})
    return reports


def _session(options: Any, run: str, config: dict[str, Any], program: str | None) -> Session:
    if config.get("unlabelled"):
        raise UserError(
            f"{run} has images without labels, and evidence counts hits by label; name a run on labelled images."
        )
    flags = {key: getattr(options, key) for key in ("batch", "device", "pack", "pack_jpeg")}
    parsed = measuring_of(run, config, program, options.plugins, **flags)
    if parsed.config.task == "classification":
        raise UserError(
            f"evidence is of embeddings, and {run} is a classifier; metric-kd analyse compares classifiers."
        )
    session = build(parsed)
    for note in session.notes:
        print(note, file=sys.stderr)
    return session


def _unlike(configs: Sequence[dict[str, Any]]) -> list[str]:
    """What, beside the seed, differs between runs: then their spread is not that of seeds."""
    known = [config for config in configs if config]  # a checkpoint alone has none
    keys = sorted({"teacher_load"}.union(set.intersection(*map(set, known)) if known else ()) - SEED_KEYS - {"load"})
    differing = [key for key in keys if any(config.get(key) != known[0].get(key) for config in known)]
    notes = [f"these runs differ in {', '.join(differing)}, so their spread is not that of seeds"] if differing else []
    seeds = [config["seed"] for config in known]
    if len(set(seeds)) < len(seeds):
        notes.append("some of these runs have the same seed, so they are not independent")
    return notes


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="+", help="run directories or checkpoints of the student, one per seed")
    parser.add_argument("--against", type=str | None, default=None, help="the other network; default the run's teacher")
    parser.add_argument("--k", type=int, default=NEIGHBOURS, help="how many nearest neighbours are compared")
    parser.add_argument("--json", action="store_true", help="print what is stored instead of text")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass")
    parser.add_argument("--pack", type=str | None, default=None, help="read the images from it, as run.py does")
    parser.add_argument("--pack_jpeg", type=int | None, default=None, help="quality of a --pack of JPEG images")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_plugins(parser)
    return parser
