"""--eval asymmetric: what the student's queries find in the gallery that the teacher has indexed."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from metric_kd.cli.config import DistillConfig, RunConfig
from metric_kd.cli.goals import Retrieval
from metric_kd.cli.losses import losses_of
from metric_kd.data.loading import ImageLoader
from metric_kd.distances import unit_rows
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings
from metric_kd.evaluation.retrieval import evaluate_retrieval
from metric_kd.losses.objective import Objective
from metric_kd.models.network import Network

PREFIX = "asymmetric_"


class Asymmetric(Retrieval):
    """Embeddings that query the teacher's gallery; what they are worth among themselves comes second.

    targets: loader -> the teacher's embeddings of its images (on the main process).
    """

    def __init__(self, classifier: bool, targets: Mapping[ImageLoader, Tensor]):
        super().__init__(classifier)
        self.targets = targets

    def keys(self, config: RunConfig, cameras: bool = False) -> dict[str, str]:
        across = {f"{PREFIX}recall@{k}": f"Recall@{k} in the teacher's gallery" for k in config.recall}
        return {**across, **super().keys(config, cameras)}

    def metrics(self, config: RunConfig, loader: ImageLoader, vectors: Embeddings) -> dict[str, float]:
        theirs, records = self.targets[loader], loader.records
        ours = unit_rows(vectors.vectors) if of_unit_length(theirs) else vectors.vectors
        across, _ = evaluate_retrieval(
            vectors._replace(vectors=ours),
            config.recall,
            query=records.query,
            gallery=records.gallery,
            offered_by=vectors._replace(vectors=theirs),
        )
        return {f"{PREFIX}{key}": value for key, value in across.items()} | super().metrics(config, loader, vectors)


def of_unit_length(vectors: Tensor) -> bool:
    """Whether all rows have length 1, up to what half types round."""
    return bool((torch.linalg.vector_norm(vectors.float(), dim=1) - 1).abs().max() < 1e-2)


def is_asymmetric(config: RunConfig) -> bool:
    return isinstance(config, DistillConfig) and config.eval == "asymmetric"


def check_width(config: RunConfig, student: Network, theirs: int) -> None:
    """Refuse a student of another width than the gallery's."""
    ours = student.embedding_size
    if is_asymmetric(config) and theirs != ours:
        raise UserError(
            f"--eval asymmetric: the student's embeddings have {ours} numbers and the teacher's {theirs}; give "
            f"--embedding_size {theirs}, or measure afterwards through a bridge (--bridge ridge, then "
            "metric-kd eval RUN --against TEACHER)."
        )


def check_asymmetric(config: RunConfig, student: Network, targets: Iterable[Tensor], notes: list[str]) -> None:
    """Refuse targets of another width, and note losses that leave the student in a space of its own."""
    if not is_asymmetric(config):
        return
    for vectors in targets:
        if len(vectors):
            check_width(config, student, vectors.shape[1])
    terms = dict(Objective(losses_of(config)).items())
    if not any(term.anchors for term in terms.values()):
        notes.append(
            f"--eval asymmetric: {', '.join(terms)} do not tie the student to the teacher's space, in whose gallery its "
            "queries will find things by chance; add csd or regression (--preset compatible), or fit a --bridge"
        )


def refusals(config: RunConfig) -> list[str]:
    """What --eval asymmetric and --bridge do not go with, one sentence each."""
    if not isinstance(config, DistillConfig):
        return []
    sentences = []
    for flag, given in (("eval asymmetric", config.eval == "asymmetric"), ("bridge", config.bridge != "none")):
        if not given:
            continue
        if config.task == "classification":
            sentences.append(f"--{flag} is about embeddings; leave --task classification out.")
        sentences += [
            f"--{flag} compares one student with its teacher; leave --{other} out."
            for other in ("mutual", "imitate", "fit_head")
            if getattr(config, other)
        ]
    if config.eval == "asymmetric" and config.unlabelled:
        sentences.append("--eval asymmetric measures Recall, which --unlabelled cannot; leave one of the two out.")
    return sentences
