"""From a trained network to one file that holds everything from pixels to the embedding: ONNX, or torch.export's .pt2."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metric_kd.data.transforms import Geometry
from metric_kd.deploy.bridge import Bridge
from metric_kd.deploy.lineage import Lineage, identity
from metric_kd.engine.reproducibility import weights_digest
from metric_kd.errors import UserError
from metric_kd.models.network import Network
from metric_kd.models.weight_file import SEAL_FOLLOWS, seal_archive, sealed_onnx

FORMATS = ("onnx", "pt2")
OPSET = 18
"""The opset that PyTorch's exporter writes without converting."""
INPUT, OUTPUT = "images", "embeddings"
METADATA = "metric_kd.json"
"""Under this name a .pt2 file holds what an ONNX file has in metadata_props."""
LARGEST = 2_000_000_000
"""Bytes of weights: an ONNX file is one protocol buffer, and those end at 2 GiB."""
EXAMPLE_SIDE = 48
EXTRA = "pip install 'metric_kd[export]'"


class EmbeddingGraph(nn.Module):
    """(N, 3, H, W) uint8 RGB to (N, D) float32: resize, centre crop, normalisation, network, l2 normalisation, bridge.

    bridge: the map into the teacher's space, or None.

    The view is that of :class:`~metric_kd.deploy.embedder.Embedder`: images that have the size of the crop are taken as they
    are, all others are made a square of ``side`` px, whatever their aspect, of which the centre is cut.

    Antialiased bilinear resizing is two products with matrices. Row i of the matrix from L px to S holds, with the scale
    s = L / S and its support r = max(1, s), the weights

        w_ij = max(0, 1 - |(i + 1/2) s - (j + 1/2)| / r),   divided by their sum.

    The matrices are made in the graph from H and W, so that no runtime's own resizing is relied upon, and values are
    rounded after each product (columns, then rows), as resizing of uint8 images does. PyTorch's own kernel works with
    integer weights: of random images at eight pairs of sizes at most 2.5% of the values differ from it, by 1 grey level,
    none where the size stays. (Rounded only once, 5% to 18% differ where both sides change.) At equal size w is the
    identity, so the same graph serves both kinds of images. Cost: S (3 H W + 3 H S) multiplications per image, little
    beside a network unless photos have several megapixels.
    """

    def __init__(self, network: Network, bridge: Bridge | None = None):
        super().__init__()
        assert network.spec.input_size is not None
        geometry = Geometry(input_size=network.spec.input_size, flip=False)
        self.crop, self.side = geometry.crop, geometry.side
        self.keeps = geometry.keeps(geometry.crop, geometry.crop)
        self.network = network
        self.bridge_kind = "none" if bridge is None else bridge.kind
        if bridge is not None:
            for part in ("weight", "mean", "shift"):
                self.register_buffer(part, getattr(bridge, part).to(next(network.parameters()).device))

    @property
    def bridge(self) -> Bridge | None:
        """The map with its tensors where the network is."""
        if self.bridge_kind == "none":
            return None
        return Bridge(self.get_buffer("weight"), self.get_buffer("mean"), self.get_buffer("shift"), self.bridge_kind)

    def forward(self, images: Tensor) -> Tensor:
        """(N, D) float32 of (N, 3, H, W) uint8."""
        embedding = self.network(self.view(images), want=("embedding",)).embedding
        assert embedding is not None
        bridge = self.bridge
        return embedding if bridge is None else bridge(embedding)

    def view(self, images: Tensor) -> Tensor:
        """(N, 3, crop, crop) float32 of whole numbers in 0..255."""
        rows, columns = (torch.arange(length, device=images.device).double() for length in images.shape[-2:])
        kept = (rows[-1] == self.crop - 1) & (columns[-1] == self.crop - 1) & self.keeps
        side = torch.where(kept, self.crop, self.side).double()
        corner = torch.where(kept, 0, (self.side - self.crop) // 2).double()
        narrow = torch.round(images.float() @ self._weights(columns, side, corner).T)
        return torch.round(self._weights(rows, side, corner) @ narrow)

    def _weights(self, pixels: Tensor, side: Tensor, corner: Tensor) -> Tensor:
        """(crop, L): the rows of the matrix from L px (0, 1, ... in ``pixels``) to ``side`` px that the crop keeps."""
        scale = (pixels[-1] + 1) / side
        centre = (torch.arange(self.crop, device=pixels.device).double() + corner + 0.5) * scale
        near = 1 - (pixels + 0.5 - centre[:, None]).abs() / scale.clamp(min=1)
        weights = near.clamp(min=0)
        return (weights / weights.sum(1, keepdim=True)).float()


def require_packages(form: str, int8: bool = False) -> None:
    """Raise ``UserError`` where what writes, checks or runs such a file is not installed."""
    if form != "onnx":
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"an ONNX file needs the package {error.name}, which is not installed; {EXTRA}.") from None


def describe(graph: EmbeddingGraph, name: str, version: str, lineage: Lineage | None = None) -> dict[str, str]:
    """What every exported file says of itself, as text: name, version, sizes, whether vectors have length 1, weights, bridge,
    and whose student it is."""
    network, bridge = graph.network, graph.bridge
    spec = network.spec
    return {
        "name": name,
        "metric_kd": version,
        "base": spec.base,
        "embedding_size": str(network.embedding_size if bridge is None else len(bridge.shift)),
        "input_size": str(spec.input_size),
        "normalised": str(bool(spec.l2normalize) and bridge is None).lower(),
        "weights": weights_digest(network),
        "origin": identity(network, bridge),
        "bridge": graph.bridge_kind,
        **(lineage or Lineage()).described(),
        "int8": "none",
    }


def write_onnx(graph: EmbeddingGraph, path: "Path | str", metadata: Mapping[str, str]) -> None:
    """Write an ONNX file of opset ``OPSET`` with N, H and W free, checked by onnx's own checker and sealed.

    Raises ``UserError`` where a package is missing, the weights exceed ``LARGEST`` bytes, or the network has an operation
    that ONNX has not.
    """
    require_packages("onnx")
    import onnx

    size = sum(t.numel() * t.element_size() for t in graph.state_dict().values())
    if size > LARGEST:
        raise UserError(f"the weights take {size / 2**30:.1f} GiB and an ONNX file ends at 2 GiB; export --to pt2.")
    with _explained(graph, "ONNX"), quiet():
        program = torch.onnx.export(
            graph.eval(),
            (_example(graph),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(_dynamic(),),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    stamp(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    Path(path).write_bytes(sealed_onnx(model.SerializeToString()))


def stamp(model: Any, metadata: Mapping[str, str]) -> None:
    """Let metadata_props of an ONNX model be ``metadata``, to be sealed, and drop where in our source its nodes come from."""
    from onnx import helper

    del model.metadata_props[:]
    helper.set_model_props(model, dict(metadata))
    model.doc_string = SEAL_FOLLOWS
    model.producer_name, model.producer_version = "metric_kd", metadata["metric_kd"]
    for entry in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.functions):
        del entry.metadata_props[:]
    for node in model.graph.node:
        node.ClearField("doc_string")


def write_pt2(graph: EmbeddingGraph, path: "Path | str", metadata: Mapping[str, str]) -> None:
    """Write a file for torch.export.load with N, H and W free; it runs on the kind of device where ``graph`` is."""
    with _explained(graph, "torch.export"), quiet(), torch.no_grad():
        program = torch.export.export(graph.eval(), (_example(graph),), dynamic_shapes=(_dynamic(),))
        for node in program.graph.nodes:  # where in whose files it was written is nobody's business
            node.meta.pop("stack_trace", None)
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA: json.dumps(dict(metadata))})
    seal_archive(content)
    Path(path).write_bytes(content.getvalue())


WRITERS = {"onnx": write_onnx, "pt2": write_pt2}


def _example(graph: EmbeddingGraph) -> Tensor:
    """Neither square nor of the crop's size, and more than one image: nothing may be taken for a constant."""
    device = next(graph.parameters()).device
    return torch.zeros(2, 3, EXAMPLE_SIDE + 1, EXAMPLE_SIDE, dtype=torch.uint8, device=device)


def _dynamic() -> dict[int, Any]:
    return {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}


@contextlib.contextmanager
def _explained(graph: EmbeddingGraph, what: str) -> Iterator[None]:
    """What an exporter says of an operation that it does not know, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch.onnx and torch.export raise many private types
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        base = graph.network.spec.base
        raise UserError(f"{base} cannot be exported by {what} ({lines[0].rstrip('.')}); try the other --to.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the words of exporters on their own steps, about which nobody who exports can do anything."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
