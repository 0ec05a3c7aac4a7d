"""Networks beside each other: the other one of a comparison, and images through each at the size it was trained with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from metric_kd.cli.config import DistillConfig, known_keys
from metric_kd.cli.goals import network_spec
from metric_kd.cli.pack import pack_for
from metric_kd.cli.session import Session
from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords, Splits
from metric_kd.data.transforms import Geometry
from metric_kd.engine.checkpoint import restore_network
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import Embeddings, embed
from metric_kd.models import default_pixels
from metric_kd.models.backbone import Pixels
from metric_kd.models.network import Network


@contextmanager
def loader_for(session: Session, network: Any, records: ImageRecords | None = None) -> Iterator[ImageLoader]:
    """The test view of these images (by default the session's test images) in the size of ``network.spec``."""
    config, size = session.config, network.spec.input_size
    records = session.test.records if records is None else records
    if records is session.test.records and size == config.input_size:
        yield session.test
        return
    loader = ImageLoader(
        records,
        Geometry(input_size=size, flip=False),
        seed=config.seed,
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
        pack=pack_for(config, Splits(records, records), []),
    )
    try:
        yield loader
    finally:
        loader.close()


def embedded(
    session: Session, network: Network, records: ImageRecords | None = None, name: str = "the network"
) -> Embeddings:
    """The embeddings of these images (by default the session's test images), in the order of the data set.

    Raises ``UserError``, with ``name`` (as the run), where they are not finite.
    """
    config = session.config
    with loader_for(session, network, records) as loader:
        found = embed(
            network,
            loader.test(config.batch),
            device=session.device,
            precision=config.precision,
            progress="embedding",
            total=-(-len(loader.records) // config.batch),
        )
    lost = int((~found.vectors.isfinite().all(1)).sum())
    if lost:
        raise UserError(
            f"{name}: its embeddings of {lost} of {len(found.vectors)} images are not finite; train it again with a lower "
            "learning rate, or with fp32 instead of fp16."
        )
    return found


def teacher_beside(session: Session, path: str, stored: Mapping[str, Any]) -> Network:
    """The other network of a comparison, ready to embed.

    stored: the config of the student's run. A plain state dict is what that says of its teacher, or else a network like the
    student.
    """
    fallback = network_spec(session.config, "", default_pixels(session.config.base) or Pixels(), {})
    if "teacher_base" in stored:
        config = DistillConfig(**{key: stored[key] for key in known_keys("distill") if key in stored})
        fallback = network_spec(config, "teacher_", default_pixels(config.teacher_base) or Pixels(), {})
    teacher = restore_network(path, fallback, {}, "teacher")
    return teacher.to(session.device).eval().requires_grad_(False)
