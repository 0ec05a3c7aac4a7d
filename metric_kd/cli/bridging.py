"""--bridge: a map into the teacher's space, fitted on the training images after training and kept with the student."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from metric_kd.cli.config import DistillConfig
from metric_kd.cli.session import Session
from metric_kd.deploy.bridge import fit_bridge
from metric_kd.engine.checkpoint import read_checkpoint, write_checkpoint
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.stored_teacher import StoredTeacher
from metric_kd.evaluation.embed import with_bar
from metric_kd.models.network import Network, NetworkSpec, build_network, load_weights
from metric_kd.modes import eval_mode
from metric_kd.types import Batch


def keep_bridge(session: Session, run: RunDirectory) -> str | None:
    """Fit what --bridge asks for to the network in best.pth, write it there, and say so; None where nothing is asked.

    Both networks see the test view of every training image or, where the teacher is a cache of fixed views, the first
    view. For the main process.
    """
    config = session.config
    if not isinstance(config, DistillConfig) or config.bridge == "none":
        return None
    content = read_checkpoint(run.best)
    student = build_network(NetworkSpec.from_dict(content["network"]))
    load_weights(student, content["model"], strict=True)
    ours, theirs = _both(session, student.to(session.device))
    bridge = fit_bridge(ours, theirs, config.bridge)
    write_checkpoint(run.claim(run.best), {**content, "bridge": bridge.state()})
    return f"a {config.bridge} bridge into the teacher's space, fitted on {len(ours)} training images, is in {run.best}"


def _both(session: Session, student: Network) -> tuple[Tensor, Tensor]:
    """(N, D) and (N, E), float32 on the CPU."""
    teacher, ours, theirs = session.teacher, list[Tensor](), list[Tensor]()
    assert teacher is not None
    running = [student] if isinstance(teacher, StoredTeacher) else [student, teacher]
    total = -(-len(session.train) // session.config.batch)
    with eval_mode(*running), torch.inference_mode():
        for batch in with_bar(_batches(session), "fitting the bridge", total):
            if isinstance(teacher, StoredTeacher):
                said = teacher.outputs_of(batch, ("embedding",))
            else:
                said = teacher(batch.seen_by_teacher, want=("embedding",))
            for found, output in ((ours, student(batch.images, want=("embedding",))), (theirs, said)):
                assert output.embedding is not None
                found.append(output.embedding.float().cpu())
    return torch.cat(ours).clone(), torch.cat(theirs).clone()


def _batches(session: Session) -> Iterator[Batch]:
    loader, size = session.train, session.config.batch
    for start in range(0, len(loader), size):
        rows = np.arange(start, min(start + size, len(loader)))
        yield loader.first_view(rows).to(session.device)
