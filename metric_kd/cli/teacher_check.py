"""--teacher_check: before a distillation begins, what is doubtful about its teacher and its images, in plain words.

Nothing is refused, and nothing of the run changes: no random number is drawn.
"""

import time

import numpy as np
import torch
from torch import Tensor

from metric_kd.cli.config import DistillConfig
from metric_kd.cli.session import Session
from metric_kd.data.repeats import find_repeats, name_of
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.evaluation.evidence import effective_rank
from metric_kd.losses.objective import LossSpec, Objective
from metric_kd.models.network import Network

SAMPLE, SECONDS = 1000, 5.0
"""Training images that the teacher is asked about: at most so many, and no further batch after that time."""
COLLAPSED = 1 / 8
"""Below this share of the directions that the sample could use, the teacher is called collapsed."""
NEAR = (0.2, 5.0)
"""Mean distances that are still about 1."""


def warnings_of(session: Session) -> list[str]:
    """One sentence for each doubt; none where there is no teacher, or --teacher_check false. For the main process."""
    config = session.config
    if not isinstance(config, DistillConfig) or session.teacher is None or not config.teacher_check:
        return []
    found = _of_images(session)
    if "embedding" in Objective(session.losses).all_needs[1] and len(session.train) > 2:
        normalised = isinstance(session.student, Network) and session.student.spec.l2normalize
        found += of_embeddings(_sample(session), session.losses, normalised)
    return [f"warning: {sentence}" for sentence in found]


def of_embeddings(vectors: Tensor, losses: list[LossSpec], normalised: bool) -> list[str]:
    """What is doubtful of (N, E) embeddings of the teacher, N > 1, for a student whose embeddings have length 1 or not."""
    count, width = vectors.shape
    lost = int((~vectors.isfinite().all(1)).sum())
    if lost:  # of which nothing can be measured
        return [
            f"the teacher's embeddings of {lost} of {count} training images are not finite; look at how the teacher was trained"
        ]
    found = []
    rank, most = effective_rank(vectors), min(width, count - 1)
    if rank < COLLAPSED * most:
        found.append(
            f"the teacher's embeddings use about {rank:.1f} of their {width} dimensions (effective rank over {count} training "
            "images), so that relations among them say little; look at how the teacher was trained"
        )
    apart = float(torch.pdist(vectors.float()).mean())
    bound = [loss.name for loss in losses if loss.weight and _depends_on_scale(loss, normalised)]
    if bound and not NEAR[0] <= apart <= NEAR[1]:
        found.append(
            f"the teacher's embeddings lie {apart:.3g} apart on average, and loss {', '.join(bound)} depends on that scale, "
            "which it expects near 1; normalise (its options, --l2normalize true) or choose its weight by trial"
        )
    return found


def _depends_on_scale(loss: LossSpec, normalised: bool) -> bool:
    """Whether other units of the embeddings give another loss; of the teacher dark_rank reads the order alone, but of the
    student distances.
    """
    options = loss.options
    return {
        "dark_rank": not normalised and not options.get("normalise", False),
        "irg": options.get("normalise") is False,
        "regression": options.get("distance") == "euclidean",
    }.get(loss.name, False)


def _sample(session: Session) -> Tensor:
    """(N, E), float32 on the CPU: the teacher of the test view of some training images, or of what is stored of them."""
    teacher, loader, started = session.teacher, session.train, time.monotonic()
    rows = np.random.default_rng(0).permutation(len(loader))[:SAMPLE]
    parts: list[Tensor] = []
    for part in np.array_split(rows, -(-len(rows) // session.config.batch)):
        batch = loader.first_view(np.sort(part)).to(session.device)
        with torch.inference_mode():
            if isinstance(teacher, StoredTeacher):
                said = teacher.outputs_of(batch, ("embedding",))
            else:
                assert teacher is not None
                said = teacher(batch.seen_by_teacher, ("embedding",))
        assert said.embedding is not None
        parts.append(said.embedding.float().cpu())
        if time.monotonic() - started > SECONDS and sum(map(len, parts)) > 2:
            break
    return torch.cat(parts).clone()


def _of_images(session: Session) -> list[str]:
    """Images that are there twice."""
    train, test = session.train.records, session.test.records
    repeats, found = find_repeats(train, test), []
    if repeats.leaked:
        row, other = repeats.leaked[0]
        found.append(
            f"{len(repeats.leaked)} of {len(test)} test images are training images too ({name_of(test, row)} is "
            f"{name_of(train, other)}), so that what is measured on them is not how unseen images are found"
        )
    if repeats.within:
        row, other = repeats.within[0]
        crossed = sum(train.labels[one] != train.labels[two] for one, two in repeats.within)
        apart = f", {crossed} of them under another class" if crossed else ""
        found.append(
            f"{len(repeats.within)} of {len(train)} training images repeat another one{apart} ({name_of(train, row)} is "
            f"{name_of(train, other)})"
        )
    if found and not repeats.whole:
        found.append("not all images that may be equal were compared, there are too many; more may repeat")
    return found
