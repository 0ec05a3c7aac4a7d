"""Exported: an exported file as something that embeds images, without the code of its network."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metric_kd.deploy.embedder import pixels_of, several
from metric_kd.deploy.export import EXTRA, FORMATS, INPUT, METADATA, quiet
from metric_kd.deploy.program import check_program
from metric_kd.errors import UserError
from metric_kd.models.weight_file import SEAL_FOLLOWS, is_sealed, read_checked
from metric_kd.plain import parse_json

AT_ONCE = 1 << 24
"""Pixels that are decoded, or run, together at most (192 MiB as float32): photos are not all small."""
DESCRIBED = ("name", "embedding_size", "input_size", "normalised")

Run = Callable[[np.ndarray], np.ndarray]
"""(N, 3, H, W) uint8 to (N, D) float32."""


class Exported:
    """``Exported("student.onnx").embed(["a.jpg"])``: an ONNX file in ONNX Runtime, or a .pt2 file in PyTorch.

    dimensions: D. normalised: whether vectors have length 1. metadata: what the file says of itself, as text. sha256: of
    the file's bytes. Both formats compute on as many threads as torch does. A .pt2 file runs on the device for which it
    was exported.

    Raises ``UserError`` for a file that is missing, damaged or not of this project, and where ONNX Runtime is not installed.
    A .pt2 file is a program: open none that you would not run.
    """

    def __init__(self, path: "str | Path"):
        self.path = Path(path)
        if self.path.suffix.removeprefix(".") not in FORMATS:
            raise UserError(f"{self.path} is no exported file; give one that ends in .onnx or .pt2.")
        if not self.path.exists():
            raise UserError(f"the exported file {self.path} does not exist; check the path.")
        content = read_checked(self.path, str(self.path), "copy it again or export it again")
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._run: Run
        self._run, self.metadata = (_onnx if self.path.suffix == ".onnx" else _pt2)(self.path, content)
        for key in DESCRIBED:
            if key not in self.metadata:
                raise UserError(f"{self.path} does not say its {key}; give a file that `metric-kd export` wrote.")
        self.dimensions = int(self.metadata["embedding_size"])
        self.normalised = self.metadata["normalised"] == "true"

    def run(self, images: "Tensor | np.ndarray") -> np.ndarray:
        """(N, D) float32 of (N, 3, H, W) uint8: one call of the graph. Raises ``UserError`` for anything else."""
        array = np.ascontiguousarray(images)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3 or 0 in array.shape[2:]:
            raise UserError(
                f"an exported file runs on (N, 3, H, W) uint8, got {array.shape} {array.dtype}; convert it, or use embed."
            )
        if not len(array):
            return np.zeros((0, self.dimensions), np.float32)
        return self._run(array)

    def embed(
        self, images: Any, batch: int = 64, progress: bool = False, skipped: list[Any] | None = None
    ) -> np.ndarray:
        """(N, D) float32 embeddings of N images, in their order.

        images, skipped and errors: as of :meth:`Embedder.embed`. Images of one size run together, ``batch`` of them or
        fewer: ``AT_ONCE`` bounds the memory.
        """
        images = several(images, batch)
        vectors = np.zeros((len(images), self.dimensions), dtype=np.float32)
        good = np.ones(len(images), dtype=bool)
        pixels = self._decoded(images, good, skipped, progress)
        for rows, stack in _stacks(pixels, batch):
            vectors[rows] = self.run(stack)
        return vectors if good.all() else vectors[good]

    def _decoded(
        self, images: Any, good: np.ndarray, skipped: list[Any] | None, progress: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        for row, image in enumerate(tqdm(images, desc="embedding", unit="img", disable=not progress, leave=False)):
            try:
                yield row, pixels_of(image).numpy()
            except UserError:
                if skipped is None:
                    raise
                skipped.append(image)
                good[row] = False


def _stacks(images: Iterator[tuple[int, np.ndarray]], batch: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """(rows, (n, 3, H, W)): images of one size gathered until there are enough, or all that wait are too many pixels."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    held = 0
    for row, pixels in images:
        group = waiting.setdefault(pixels.shape, [])
        group.append((row, pixels))
        held += pixels[0].size
        full = [pixels.shape] if len(group) >= batch else []
        if held >= AT_ONCE:
            full = list(waiting)
        for shape in full:
            group = waiting.pop(shape)
            held -= sum(p[0].size for _, p in group)
            yield [r for r, _ in group], np.stack([p for _, p in group])
    for group in waiting.values():
        yield [r for r, _ in group], np.stack([p for _, p in group])


def _onnx(path: Path, content: bytes) -> tuple[Run, dict[str, str]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"running {path} needs the package {error.name}, which is not installed; {EXTRA}.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        # What others wrote may have its weights in files beside it, which are found by the path only.
        model = content if is_sealed(content) else str(path)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta()
        description, metadata = about.description, dict(about.custom_metadata_map)
    except Exception as error:  # the types of ONNX Runtime's exceptions are private
        raise _damaged(path) from error
    # Where others write a doc_string, the graph follows it: at the end of a file it is a seal, here of wrong bytes.
    if (
        not is_sealed(content)
        and description
        and (description == SEAL_FOLLOWS or content.endswith(description.encode()))
    ):
        raise _damaged(path)
    if [entry.name for entry in session.get_inputs()] != [INPUT]:
        raise UserError(f"{path} takes other inputs than {INPUT}; give a file that `metric-kd export` wrote.")

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {INPUT: images})[0]

    return run, metadata


def _pt2(path: Path, content: bytes) -> tuple[Run, dict[str, str]]:
    extra = {METADATA: ""}
    try:
        check_program(path, content)
        with quiet():
            program = torch.export.load(io.BytesIO(content), extra_files=extra)
        metadata = parse_json(extra[METADATA] or "{}")
    except UserError:
        raise
    except Exception as error:  # a damaged file raises what its bytes lead to
        raise _damaged(path) from error
    module = program.module()
    device = next(iter(program.state_dict.values())).device

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(device)).cpu().numpy()

    return run, metadata


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} cannot be read, it seems truncated, damaged or of another program; export it again.")
