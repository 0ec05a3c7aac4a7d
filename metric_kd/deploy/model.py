"""open_model: a run, a checkpoint or an exported file as one thing that embeds, with a digest to know it by."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from metric_kd.deploy.embedder import load
from metric_kd.engine.checkpoint import find_checkpoint
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.errors import UserError


class Embeds(Protocol):
    """What an index needs of a network; see :class:`metric_kd.deploy.embedder.Embedder`."""

    def embed(
        self, images: Any, batch: int = 64, progress: bool = False, skipped: list[Any] | None = None
    ) -> np.ndarray: ...


class Model(NamedTuple):
    """path: absolute; digest: of weights and description, or of the bytes of an exported file; what: in words."""

    embedder: Embeds
    path: str
    digest: str
    dimensions: int
    what: str
    normalised: bool


def open_model(path: "str | Path", device: str = "cpu", precision: str = "fp32") -> Model:
    """Raises ``UserError`` as :func:`metric_kd.load` does, and for an exported file in another precision than its own."""
    path = Path(path)
    if path.suffix == ".onnx":
        if precision != "fp32":
            raise UserError(f"--precision {precision} is of networks; an exported file has its own, leave it out.")
        if not path.is_file():
            raise UserError(f"the exported model {path} does not exist; check the path.")
        from metric_kd.deploy.exported import Exported

        exported = Exported(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Model(
            exported, str(path.resolve()), digest, exported.dimensions, "an exported network", exported.normalised
        )
    embedder = load(path, device, precision)
    spec = embedder.network.spec
    what = f"{spec.base}, {embedder.network.embedding_size} dimensions, {spec.input_size} px"
    described = json.dumps(spec.to_dict(), sort_keys=True) + weights_digest(embedder.network)
    digest = hashlib.sha256(described.encode()).hexdigest()
    where = str(find_checkpoint(path).resolve() if path.is_file() else path.resolve())
    return Model(embedder, where, digest, embedder.network.embedding_size, what, spec.l2normalize)
