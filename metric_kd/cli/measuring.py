"""The networks of `metric-kd report`, measured: test images are read once per run, and a teacher is asked about the same ones."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metric_kd.cli.config import DistillConfig, known_keys
from metric_kd.cli.embedding import embedded
from metric_kd.cli.goals import goal_of
from metric_kd.cli.networks import teacher_of
from metric_kd.cli.reported import Finished, accuracies, further_metrics, recipe_of
from metric_kd.cli.session import Session, build, measuring_of
from metric_kd.data.records import ImageRecords
from metric_kd.deploy.parity import milliseconds
from metric_kd.devices import choose_device
from metric_kd.engine.checkpoint import find_checkpoint, restore_network
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.errors import UserError
from metric_kd.evaluation.metrics import hits_at_k
from metric_kd.evaluation.retrieval import evaluate_retrieval, gallery_size
from metric_kd.evaluation.statistics import Interval, bootstrap
from metric_kd.models.network import Network, NetworkSpec
from metric_kd.report.cost import Cost, flops_of
from metric_kd.report.gallery import pixels_of
from metric_kd.report.measured import Measured, TestSet
from metric_kd.report.run_report import NEIGHBOURS
from metric_kd.report.runs import RunSummary


@dataclass
class Gathered:
    """Networks by the file that they come from, on one set of test images."""

    test: TestSet
    networks: dict[Path, Measured] = field(default_factory=dict)

    def whole(self) -> TestSet:
        """Teachers first, the rest in the order in which it was given."""
        taught = {network.teacher for network in self.networks.values()}
        networks = [
            replace(n, summary=replace(n.summary, role="teacher", note="")) if n.title in taught else n
            for n in self.networks.values()
        ]
        return replace(self.test, networks=sorted(networks, key=lambda network: network.title not in taught))


class Measuring:
    """Runs, one after the other, sorted by their test images. notes: what is left out, and why."""

    def __init__(self, titles: dict[Path, str], device: str):
        self.titles, self.device = titles, device
        self.found: dict[tuple[bool, str], Gathered] = {}
        self.notes: list[str] = []
        self.given: dict[Path, str] = {}
        self.costs: dict[tuple[NetworkSpec, str], Cost] = {}

    def add_all(self, runs: list[Finished]) -> list[TestSet]:
        self.given = {run.file: run.tested_on for run in runs}
        for run in runs:
            (self._classifier if run.classifies else self._embedding)(run)
        tests = [gathered.whole() for gathered in self.found.values()]
        names = [test.name for test in tests]
        return [
            replace(test, name=f"{test.name}, part {k}") if names.count(test.name) > 1 else test
            for k, test in enumerate(tests, 1)
        ]

    def _embedding(self, run: Finished) -> None:
        title = self.titles[run.file]
        session = self._session(run)
        try:
            records = session.test.records
            if records.fingerprint() != run.tested_on:
                self.notes.append(f"{title}: its test images are not those that it was tested on when it was trained.")
            gathered = self._gathered(run, records)
            student = session.student
            assert isinstance(student, Network)
            teacher = self._teacher(run, session, gathered)
            gathered.networks[run.file] = self._embeds(session, student, _about(run, title, teacher))
        finally:
            session.close()
        self._peers(run, title)

    def _classifier(self, run: Finished) -> None:
        """As the run itself measured it: its test images are read only where its teacher is asked about them."""
        title = self.titles[run.file]
        images, classes = run.card["data"]["test"]
        described = f"{images:,} new images of the {classes:,} classes that were trained on"
        test = TestSet(run.data, described, images, [], [])
        gathered = self.found.setdefault((True, run.tested_on), Gathered(test))
        self.notes.append(
            f"{title} is a classifier: galleries, the embedding map and Recall, which is for classes that were not seen in "
            "training, are left out; its accuracy stands instead."
        )
        network = restore_network(run.file, None, {}).to(choose_device(self.device)).eval().requires_grad_(False)
        teacher = None
        if run.teacher is not None:
            try:
                session = self._session(run)
                try:
                    teacher = self._teacher(run, session, gathered)
                finally:
                    session.close()
            except UserError as error:
                self.notes.append(f"The teacher of {title} is left out: {error}")
        gathered.networks[run.file] = self._classifies(network, accuracies(run), images, _about(run, title, teacher))
        self._peers(run, title)

    def _session(self, run: Finished) -> Session:
        try:
            return build(measuring_of(str(run.run.path), run.config, device=self.device))
        except UserError as error:
            raise UserError(f"{run.run.path}: {error}") from error

    def _gathered(self, run: Finished, records: ImageRecords) -> Gathered:
        sides = "".join(
            str(np.packbits(side).tobytes()) for side in (records.query, records.gallery) if side is not None
        )
        asked, offered = _rows(records.query, len(records)), _rows(records.gallery, len(records))
        described = f"{len(records):,} of {records.num_classes:,} classes that were not trained on, "
        whole = records.query is None and records.gallery is None
        if whole:
            described += "each a query against all others"
        else:
            described += f"{len(asked):,} queries against a gallery of {len(offered):,}"
        test = TestSet(
            run.data,
            described,
            len(asked),
            records.class_names,
            [],
            pixels_of(records, asked),
            None if whole else pixels_of(records, offered),
        )
        return self.found.setdefault((False, records.fingerprint() + sides), Gathered(test))

    def _teacher(self, run: Finished, session: Session, gathered: Gathered) -> str | None:
        """The title of the run's teacher, which is measured where it is not yet; None, and a note, where that cannot be."""
        path, title = run.teacher, self.titles[run.file]
        if path is None:
            return None
        reason = ""
        if path.endswith(".npy"):
            reason = "is a file of embeddings"
        elif not Path(path).exists():
            reason = "is not there any more"
        if reason:
            self.notes.append(f"The teacher of {title}, {path}, {reason}: nothing is compared with it.")
            return None
        file = find_checkpoint(path, "teacher").resolve()
        name = self.titles[file]
        if file in gathered.networks or self.given.get(file) == run.tested_on:
            return name
        network = _teacher_network(run, session).to(session.device).eval().requires_grad_(False)
        digest = (
            None if run.config.get("granularity_load") else run.card["environment"].get("teacher")
        )  # coders count too
        if digest not in (None, weights_digest(network)):
            self.notes.append(
                f"{name} is not the teacher that {title} had, weights {digest}: it was trained again since."
            )
        summary = RunSummary(name, "teacher", 0, 0, {1: 0.0}, 0.0)
        blank = Measured(summary, network.spec.base, Cost(0, 0, (0.0, 0.0), 0), {})
        if run.classifies:
            measured = _top(session, network)
            gathered.networks[file] = self._classifies(network, measured, gathered.test.queries, blank)
        else:
            gathered.networks[file] = self._embeds(session, network, blank)
        return name

    def _peers(self, run: Finished, title: str) -> None:
        if peers := run.card.get("peers"):
            self.notes.append(f"{title} was trained together with {len(peers)} peers, which are left out.")

    def _embeds(self, session: Session, network: Network, about: Measured) -> Measured:
        records = session.test.records
        ks = sorted({1, *session.config.recall})
        near = min(NEIGHBOURS, gallery_size(len(records), records.query, records.gallery))
        vectors = embedded(session, network, records, about.title)
        _, found = evaluate_retrieval(vectors, [*ks, near], query=records.query, gallery=records.gallery)
        hits = {k: hits_at_k(found, k) for k in ks}
        scores = {f"Recall@{k}": bootstrap(values) for k, values in hits.items()}
        return replace(
            self._with_cost(network, about, scores, "embedding"),
            hits=hits[1],
            found=found,
            vectors=vectors.vectors,
            labels=vectors.labels,
        )

    def _classifies(self, network: Network, accuracy: dict[str, float], images: int, about: Measured) -> Measured:
        """With the interval that the hits and misses behind an accuracy give; which images they were makes no difference."""
        scores = {}
        for name, value in accuracy.items():
            right = round(value * images)
            scores[name] = bootstrap(np.repeat([1.0, 0.0], [right, images - right]))._replace(mean=value)
        return self._with_cost(network, about, scores, "logits")

    def _with_cost(self, network: Network, about: Measured, scores: dict[str, Interval], answer: str) -> Measured:
        key = (network.spec, answer)  # equal networks cost the same, however the clock shakes
        if key not in self.costs:
            self.costs[key] = cost_of(network, answer)
        cost = self.costs[key]
        first = next(iter(scores.values()))
        summary = replace(about.summary, parameters=cost.parameters, embedding_size=cost.size, recall={1: first.mean})
        return replace(about, summary=summary, cost=cost, scores=scores)


def _about(run: Finished, title: str, teacher: str | None) -> Measured:
    """What is known of a run before its network is measured."""
    history = [record for record in run.run.history() if "stage" not in record]
    seconds = sum(record.get("seconds", 0.0) for record in history)
    role = "distilled" if run.teacher is not None else "alone"
    summary = RunSummary(
        title, role, 0, 0, {1: 0.0}, seconds, history, note="without a teacher" if role == "alone" else ""
    )
    return Measured(
        summary,
        str(run.config["base"]),
        Cost(0, 0, (0.0, 0.0), 0),
        {},
        teacher=teacher,
        recipe=recipe_of(run),
        further=further_metrics(run),
    )


def cost_of(network: Network, answer: str) -> Cost:
    """Parameters, FLOPs and times where the network is. answer: the field of its output that is asked for."""
    device, side = next(network.parameters()).device, network.spec.input_size
    assert side is not None

    def run(images: Tensor) -> Any:
        with torch.inference_mode():
            return getattr(network(images.to(device), want=(answer,)), answer).cpu()

    images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, many = milliseconds(run, images)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, flops_of(network, side, answer), (one, many), network.embedding_size)


def _teacher_network(run: Finished, session: Session) -> Network:
    """As the run itself read it, from a plain state dict too; without coders."""
    config = DistillConfig(**{key: run.config[key] for key in known_keys("distill") if key in run.config})
    plain = replace(config, granularity=None, granularity_load=None)
    network = teacher_of(plain, frozenset(), goal_of(plain).head(session.test.records.num_classes))
    assert isinstance(network, Network)
    return network


def _top(session: Session, teacher: Network) -> dict[str, float]:
    found = session.goal.evaluate(session.config, session.device, session.test)(teacher)
    return {f"Top-{key[3:]} accuracy": value for key, value in found.items() if key[3:].isdecimal()}


def _rows(side: np.ndarray | None, count: int) -> np.ndarray:
    return np.arange(count) if side is None else np.flatnonzero(side)
