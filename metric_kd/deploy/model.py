"""open_model: a run, a checkpoint or an exported .onnx file as one thing that embeds, with a digest to know it by."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from metric_kd.deploy.embedder import load
from metric_kd.deploy.lineage import Lineage, identity, lineage_of
from metric_kd.engine.checkpoint import find_checkpoint
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.errors import UserError


class Embeds(Protocol):
    """What an index needs of a network; see :class:`metric_kd.deploy.embedder.Embedder`."""

    def embed(
        self, images: Any, batch: int = 64, progress: bool = False, skipped: list[Any] | None = None
    ) -> np.ndarray: ...


class Model(NamedTuple):
    """path: absolute; digest: of weights and description, or of the bytes of an exported file; what: in words; origin:
    the digest of the network that it is, also where it was exported; weights: digest of these alone; lineage: whose student
    it is."""

    embedder: Embeds
    path: str
    digest: str
    dimensions: int
    what: str
    normalised: bool
    origin: str
    weights: str
    lineage: Lineage


def open_model(path: "str | Path", device: str = "cpu", precision: str = "fp32", bridge: bool = False) -> Model:
    """path: a run, a checkpoint or an exported .onnx file; bridge: through the one that is stored with a student.

    Raises ``UserError`` as :func:`metric_kd.load` does, and for an exported file that is a program, with a bridge to add, or
    in another precision than its own.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        raise UserError(f"{path} is a program, which an index does not open; give the run, or export it --to onnx.")
    if path.suffix == ".onnx":
        if precision != "fp32":
            raise UserError(f"--precision {precision} is of networks; an exported file has its own, leave it out.")
        if bridge:
            raise UserError(f"{path} holds its bridge, if it has one (metric-kd export --bridge); leave --bridge out.")
        if not path.is_file():
            raise UserError(f"the exported model {path} does not exist; check the path.")
        return _open_exported(path)
    embedder = load(path, device, precision, bridge)
    spec = embedder.network.spec
    what = f"{spec.base}, {embedder.dimensions} dimensions, {spec.input_size} px"
    if embedder.bridge is not None:
        what += f", through a {embedder.bridge.kind} bridge"
    digest = identity(embedder.network, embedder.bridge)
    return Model(
        embedder,
        path=str(find_checkpoint(path).resolve() if path.is_file() else path.resolve()),
        digest=digest,
        dimensions=embedder.dimensions,
        what=what,
        normalised=embedder.normalised,
        origin=digest,
        weights=weights_digest(embedder.network),
        lineage=lineage_of(find_checkpoint(path), bridge),
    )


def _open_exported(path: Path) -> Model:
    from metric_kd.deploy.exported import Exported

    exported = Exported(path)
    return Model(
        exported,
        path=str(path.resolve()),
        digest=exported.sha256,
        dimensions=exported.dimensions,
        what="an exported network",
        normalised=exported.normalised,
        origin=exported.metadata.get("origin", ""),
        weights=exported.metadata.get("weights", ""),
        lineage=Lineage.from_description(exported.metadata),
    )
