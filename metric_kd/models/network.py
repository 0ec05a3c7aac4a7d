"""Network: normalisation, backbone, linear embedding and, where asked for, a classifier."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metric_kd.distances import at_least_float32
from metric_kd.errors import UserError, one_of
from metric_kd.models.backbone import Backbone, Pixels, Resolved
from metric_kd.models.layers import LAYER, output_with_layers
from metric_kd.models.lent_memory import LentMemory
from metric_kd.models.names import resolve
from metric_kd.types import Output

_MEMORY = LentMemory()
"""Of normalised images: those of a teacher are gone when the student's are made, those of a step before the next."""


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build a network again; a checkpoint holds it as plain types.

    base: name with options, see :func:`~metric_kd.models.names.parse_base`. embedding_size: 0 makes the pooled feature
    the embedding. input_size: px of a square test image, None for the backbone's. pixels: None for the backbone's, or
    ImageNet's where it has none. num_classes: give the pooled feature a classifier with so many outputs.
    """

    base: str
    embedding_size: int = 128
    l2normalize: bool = True
    input_size: int | None = None
    pixels: Pixels | None = None
    num_classes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only: safe for ``torch.load(weights_only=True)`` and for YAML."""
        plain = {**asdict(self), "pixels": None}
        if self.pixels is not None:
            p = self.pixels
            plain["pixels"] = {"mean": list(p.mean), "std": list(p.std), "scale": p.scale, "bgr": p.bgr}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "NetworkSpec":
        """The inverse of :meth:`to_dict`; raises UserError for a key it does not know or a missing base."""
        known = [f.name for f in fields(cls)]
        for key in plain:
            if key not in known:
                raise one_of("entry of a network's description", key, known)
        if "base" not in plain:
            raise UserError("a network's description has no entry 'base'; give the name of its backbone.")
        values = dict(plain)
        if values.get("pixels") is not None:
            p = values["pixels"]
            values["pixels"] = Pixels(tuple(p["mean"]), tuple(p["std"]), float(p["scale"]), bool(p["bgr"]))
        return cls(**values)


def build_network(spec: NetworkSpec) -> "Network":
    """A network with random weights (torch's global generator); ``network.spec`` has every default filled in.

    Raises UserError for an unknown backbone or option, and for sizes that cannot be.
    """
    if spec.embedding_size < 0:
        raise UserError(f"an embedding size of {spec.embedding_size} is not possible; choose 1 or more, or 0 for none.")
    if spec.num_classes is not None and spec.num_classes < 1:
        raise UserError(f"a classifier with {spec.num_classes} classes is not possible; choose 1 or more.")
    if spec.pixels is not None and 0 in spec.pixels.std:
        raise UserError("a standard deviation of 0 cannot normalise pixels; give one above 0 per channel.")
    resolved = resolve(spec.base, spec.input_size)
    pixels = spec.pixels or resolved.pixels or Pixels()
    return Network(replace(spec, input_size=resolved.input_size, pixels=pixels), resolved)


class Network(nn.Module):
    """``network(images, want=("embedding",)) -> Output`` for uint8 or float images in 0..255.

    Submodules: ``base``, ``linear`` where the embedding is a layer of its own, ``classifier`` where there is one.
    provides: the fields of :class:`~metric_kd.types.Output` it can give. pooled_size, embedding_size: their widths.
    """

    role = "network"
    """Under this name a checkpoint holds the description."""
    pixel_scale: Tensor
    pixel_shift: Tensor

    def __init__(self, spec: NetworkSpec, resolved: Resolved):
        super().__init__()
        assert spec.pixels is not None
        self.spec = spec
        self.base = resolved.module
        self.pooled_size = resolved.pooled_size
        self.embedding_size = spec.embedding_size or resolved.pooled_size
        self.foreign_heads = resolved.heads
        self._read = resolved.read
        self.linear = nn.Linear(self.pooled_size, spec.embedding_size) if spec.embedding_size else None
        self.classifier = nn.Linear(self.pooled_size, spec.num_classes) if spec.num_classes else None
        if self.classifier is not None and isinstance(self.base, Backbone):
            self.base.start_classifier(self.classifier)
        own = {"pooled", "embedding", "logits"} if self.classifier is not None else {"pooled", "embedding"}
        self.provides = frozenset(resolved.provides | own)
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (spec.pixels.mean, spec.pixels.std))
        self.register_buffer("pixel_scale", (spec.pixels.scale / 255 / std).float(), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).float(), persistent=False)

    @property
    def rgb_scale(self) -> Tensor:
        """(1, 3, 1, 1), by which a pixel value (0..255) is multiplied, in the order of the images' channels."""
        assert self.spec.pixels is not None
        return self.pixel_scale.flip(1) if self.spec.pixels.bgr else self.pixel_scale

    def normalise(self, images: Tensor) -> Tensor:
        """(pixel * scale/255 - mean) / std, in the network's dtype and the images' memory format."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise UserError(f"images have shape {tuple(images.shape)}; give (N, 3, H, W).")
        assert self.spec.pixels is not None
        if self.spec.pixels.bgr:
            images = images.flip(1)
        if self._by_rows(images):
            return self._normalised_rows(images)
        raised = images.to(self.pixel_scale.dtype)
        if images.is_floating_point() or torch.compiler.is_compiling():
            return torch.addcmul(self.pixel_shift, raised, self.pixel_scale)
        # ``raised`` is a fresh copy without a gradient, so it can hold the result: half the time of a second copy.
        return torch.addcmul(self.pixel_shift, raised, self.pixel_scale, out=raised)

    def _by_rows(self, images: Tensor) -> bool:
        return (
            type(images) is Tensor
            and images.dtype == torch.uint8
            and images.device.type == "cpu"
            and self.pixel_scale.dtype == torch.float32
            and images.is_contiguous(memory_format=torch.channels_last)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        )

    def _normalised_rows(self, images: Tensor) -> Tensor:
        """The same bits in a quarter of the time: rows of 3 W numbers instead of pixels of 3, in memory used before."""
        count, _, height, width = images.shape
        scale, shift = (t.flatten().repeat(width) for t in (self.pixel_scale, self.pixel_shift))
        rows = _MEMORY.empty((count * height, 3 * width))
        rows.copy_(images.permute(0, 2, 3, 1).reshape(count * height, 3 * width))
        torch.addcmul(shift, rows, scale, out=rows)
        return rows.view(count, height, width, 3).permute(0, 3, 1, 2)

    def forward(self, images: Tensor, want: tuple[str, ...] = ("embedding",)) -> Output:
        """What is wanted, and nothing else; pooled, embedding and logits are float32 (float64 in a float64 network)
        under autocast too.

        "layer:NAME" fills ``taps[NAME]`` with any layer's feature (:mod:`metric_kd.models.layers`). Raises UserError for
        a field that is not in ``provides``, a layer that is none, and images that are not (N, 3, H, W).
        """
        if any(field.startswith(LAYER) for field in want):
            return output_with_layers(self, images, want)
        for field in want:
            if field not in self.provides:
                raise UserError(
                    f"{self.spec.base} cannot give {field!r}, only {', '.join(sorted(self.provides))}; "
                    + ("build it with num_classes." if field == "logits" else "choose another backbone or loss.")
                )
        features = self._read(self.base, self.normalise(images), want)
        assert features.pooled is not None
        embedding = logits = None
        if "embedding" in want:
            embedding = at_least_float32(features.pooled if self.linear is None else self.linear(features.pooled))
            if self.spec.l2normalize:
                embedding = F.normalize(embedding, dim=1)
        if "logits" in want:
            assert self.classifier is not None
            logits = at_least_float32(self.classifier(features.pooled))
        return Output(
            maps=features.maps if "maps" in want else None,
            preacts=features.preacts if "preacts" in want else None,
            pooled=at_least_float32(features.pooled) if "pooled" in want else None,
            embedding=embedding,
            logits=logits,
        )


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> list[str]:
    """Copy a plain state dict, of this project or of the RKD reference (``base.*``, ``linear.*``), into the network.

    strict: every tensor must fit, else UserError names the first one that is missing, unknown or of another shape, and
    nothing is copied. Not strict: what fits is copied, and the names in ``state`` that did not fit are returned;
    UserError where nothing fits. Batch counters may be missing (old files have none).
    """
    state = _plain_names(state)
    missing, unknown, mismatched = compare_state(network, state)
    own = network.state_dict()
    if strict:
        for name in missing:
            raise UserError(
                f"the weights have no {name!r}, which this network needs; check backbone and embedding size."
            )
        for name in mismatched:
            raise UserError(
                f"the weights have {name!r} of shape {tuple(state[name].shape)} where this network has "
                f"{tuple(own[name].shape)}; check backbone and embedding size."
            )
        for name in unknown:
            raise UserError(f"the weights have {name!r}, which this network does not have; check the backbone.")
    left = [*unknown, *mismatched]
    fitting = {name: value for name, value in state.items() if name not in set(left)}
    if not fitting:
        raise UserError("none of the weights fit this network; check that the file belongs to this backbone.")
    network.load_state_dict(fitting, strict=False)
    return left


def compare_state(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that the module has and the state lacks, names only in the state, and names whose shapes differ."""
    own = module.state_dict()
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unknown = [n for n in state if n not in own]
    mismatched = [n for n in state if n in own and state[n].shape != own[n].shape]
    return missing, unknown, mismatched


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without DataParallel's ``module.``, and without the ``model.`` under which the reference keeps BN-Inception."""
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"entry {name!r} of the weights is no tensor; give a plain state dict.")
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("base.model.") for name in plain):
        heads = ("base.model.last_linear.", "base.model.fc.")
        plain = {n.replace("base.model.", "base.", 1): v for n, v in plain.items() if not n.startswith(heads)}
    return plain
