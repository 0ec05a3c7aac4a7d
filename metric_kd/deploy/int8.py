"""An exported ONNX file in 8 bits: weights alone, or weights and activations measured on calibration images."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from metric_kd.deploy.export import INPUT, require_packages, stamp
from metric_kd.models.weight_file import sealed_onnx

KINDS = ("dynamic", "static")
WEIGHTED = {"Conv": 1, "Gemm": 1, "MatMul": 1}
"""Operation -> where among its inputs its weights are."""


def quantise_dynamic(source: Path, target: Path) -> None:
    """Weights of linear layers and convolutions as int8, per channel; the scale of activations is found in each call.

    Convolutions become ConvInteger: a quarter of the size, and often slower than float32. Weights are unsigned, because ONNX
    Runtime multiplies uint8 by uint8 only there (microsoft/onnxruntime, issue 6430). Resizing stays float32.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(source) as (model, seen):
        quantize_dynamic(
            model,
            target,
            weight_type=QuantType.QUInt8,
            per_channel=True,
            nodes_to_exclude=seen,
            use_external_data_format=False,
        )
    _describe(source, target, "dynamic")


def quantise_static(source: Path, target: Path, images: Iterable[np.ndarray]) -> None:
    """Weights (per channel) and activations as int8 between QuantizeLinear and DequantizeLinear pairs.

    images: (n, 3, H, W) uint8 batches, of which activations take their range, from the smallest value to the largest. ONNX
    Runtime's entropy method is not offered: it has by default as many bins as levels, and so found the same ranges on five
    networks, while holding every activation of every image in memory. Resizing and normalisation stay float32. On CPUs
    without VNNI (before 2019), sums of int8 products may saturate; measure there before relying on it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with _prepared(source) as (model, seen):
        quantize_static(
            model,
            target,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=seen,
            op_types_to_quantize=list(QUANTISED),
        )
    _describe(source, target, "static")


QUANTISED = (
    "Conv",
    "Gemm",
    "MatMul",
    "Add",
    "Relu",
    "MaxPool",
    "GlobalAveragePool",
    "AveragePool",
    "Concat",
    "Mul",
    "Clip",
)


class _Reader:
    """What ONNX Runtime's calibration asks for batches."""

    def __init__(self, images: Iterable[np.ndarray]):
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._images, None)
        return None if found is None else {INPUT: found}


@contextlib.contextmanager
def _prepared(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """(a copy whose nodes have names; the names of those before the first layer)."""
    require_packages("onnx")
    import onnx

    model = onnx.load(source)
    del model.graph.value_info[
        :
    ]  # shapes are inferred anew: quantisation transposes weights, and would not believe them
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        prepared = Path(folder) / "prepared.onnx"
        onnx.save(model, prepared)
        root.setLevel(logging.ERROR)  # it recommends a preparation of its own, which fails on dynamic sizes
        try:
            yield prepared, before_the_layers(model)
        finally:
            root.setLevel(level)


def before_the_layers(model: Any) -> list[str]:
    """Names of the nodes that do not depend on any layer's output: those of resizing and normalisation, which stay exact.

    A layer is a node of ``WEIGHTED`` that has weights: the products of resizing have none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    learned: set[str] = set()
    names = []
    for node in model.graph.node:  # in topological order, as ONNX demands
        place = WEIGHTED.get(node.op_type)
        layer = place is not None and node.input[place] in weights
        if layer or any(name in learned for name in node.input):
            learned.update(node.output)
        else:
            names.append(node.name)
    return names


def _describe(source: Path, target: Path, kind: str) -> None:
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    model = onnx.load(target)
    stamp(model, {**metadata, "int8": kind})
    onnx.checker.check_model(model)
    Path(target).write_bytes(sealed_onnx(model.SerializeToString()))
