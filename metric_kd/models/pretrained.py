"""Published ImageNet weights and weight files for the backbone of a network."""

import hashlib
import os
import re
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metric_kd import scratch
from metric_kd.errors import UserError
from metric_kd.models.backbone import BACKBONES, Pixels
from metric_kd.models.fully_connected import ADDED, UNDERLYING
from metric_kd.models.names import parse_base
from metric_kd.models.network import Network, compare_state
from metric_kd.models.weight_file import read_tensors
from metric_kd.plain import opened_hdf5


class Published(NamedTuple):
    """A published weight file; without an md5 its name ends in the first digits of its sha256 ("-239d2248.pth")."""

    url: str
    label: str
    md5: str | None = None

    @property
    def checksum(self) -> tuple[str, str]:
        """Algorithm and the digits that its digest begins with."""
        if self.md5 is not None:
            return "md5", self.md5
        digits = re.search(r"-([0-9a-f]{8,})\.", self.url)
        if digits is None:
            raise UserError(f"the name of {self.url} has no checksum; get that file and pass --pretrained FILE.")
        return "sha256", digits[1]


OURS = {
    "googlenet": Published(
        "https://github.com/vadimkantorov/metriclearningbench/releases/download/data/googlenet.h5",
        "googlenet googlenet.h5",
        "c7d7856bd1ab5cb02618b3f7f564e3c6",
    ),
    "inception_v1bn": Published(
        "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-239d2248.pth",
        "inception_v1bn bn_inception-239d2248.pth",
    ),
}
"""Weights of the two Caffe-born backbones; torchvision knows its own."""


def default_pixels(base: str) -> Pixels | None:
    """How the backbone wants its input: ImageNet's mean and deviation for torchvision names (vgg11_fc among them), its
    own for googlenet and inception_v1bn, None for 32-px names, which follow the data set's. Raises UserError for an
    unknown name."""
    name, _ = parse_base(base)
    name = UNDERLYING.get(name, name)
    if name in BACKBONES:
        return getattr(BACKBONES[name], "pixels", None)
    return None if name.startswith("wrn_") else Pixels()


def published(name: str) -> Published | None:
    """The published weights of a backbone (of torchvision's, IMAGENET1K_V1: those of the RKD paper's time), or None."""
    if name in OURS:
        return OURS[name]
    if name in UNDERLYING:
        whole = published(UNDERLYING[name])
        return whole and whole._replace(label=f"{whole.label}, convolutional part")
    if name in BACKBONES or name.startswith("wrn_"):
        return None
    from torchvision.models import get_model_weights

    entry = get_model_weights(name).__members__.get("IMAGENET1K_V1")
    return None if entry is None else Published(entry.value.url, f"torchvision {name} IMAGENET1K_V1")


def load_pretrained(network: Network, choice: str, *, cache: str | None = None) -> str:
    """Fill the backbone with published weights or a file's; says in a few words what was loaded.

    choice: "auto" (ImageNet weights for torchvision names, googlenet and inception_v1bn; none for 32-px names), "true",
    "false" or the path of a file: a state dict (.pth; restricted unpickler) with torchvision's keys or with ``base.*``,
    or googlenet's .h5. Classifiers in the file are left out; everything else must fit. vgg11_fc and its like take
    the convolutional part of vgg11's weights and keep their own fc1 and fc2, unless the file has these too. cache:
    folder for downloads, torch.hub's by default. Raises UserError where there are no such weights, no network, or no
    fit.
    """
    name, _ = parse_base(network.spec.base)
    if choice == "false":
        return "random initialisation"
    if choice not in ("auto", "true"):
        path = Path(choice)
        if not path.is_file():
            raise UserError(f"--pretrained {choice} is no file; pass auto, true, false or an existing file.")
        _fill(network, name, _read(path), choice)
        return f"{path.name} (sha256 {_digest(path, 'sha256')[:12]})"
    source = published(name)
    if source is None:
        if choice == "auto" and default_pixels(name) is None:
            return "random initialisation"
        raise UserError(f"there are no published weights for {name}; pass --pretrained FILE or --pretrained false.")
    _fill(network, name, _fetch(source, cache), source.url)
    return source.label


def _fetch(source: Published, cache: str | None) -> dict[str, Tensor]:
    """The published file, from the cache or the network, its checksum verified either way."""
    folder = Path(cache or os.path.join(torch.hub.get_dir(), "checkpoints"))
    path = folder / source.url.rpartition("/")[2]
    algorithm, expected = source.checksum
    if path.is_file() and _digest(path, algorithm).startswith(expected):
        return _read(path)
    partial = None
    advice = "get that file elsewhere and pass --pretrained FILE, or pass --pretrained false."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial = scratch.create(path)
        os.close(handle)
        torch.hub.download_url_to_file(source.url, str(partial))
        found = _digest(partial, algorithm)
        if not found.startswith(expected):
            raise UserError(f"{source.url} came with {algorithm} {found} instead of {expected}; {advice}")
        os.replace(partial, path)
    except (OSError, HTTPException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"could not download {source.url} ({reason}); {advice}") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return _read(path)


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """A flat state dict from a .pth or .h5 file; UserError for a file that is neither, or broken."""
    if path.suffix in (".h5", ".hdf5"):
        state: Any = _read_h5(path)
    else:
        try:
            state = read_tensors(path, f"{path} is no readable weight file, it", "get it again")
        except UserError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} is no readable weight file ({reason[:120]}); it may be truncated, or hold more than weights: "
                "get it again."
            ) from None
    for wrapper in ("state_dict", "model", "network"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict; pass a file of named tensors.")
    return dict(state)


def _read_h5(path: Path) -> dict[str, Tensor]:
    """Every data set below a group named like a parameter ("…/conv1.7x7_s2.weight/…"), under that name."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"reading {path} needs h5py; install h5py.") from None
    state: dict[str, Tensor] = {}

    def visit(where: str, item: Any) -> None:
        names = [part for part in where.split("/") if part.endswith((".weight", ".bias"))]
        if names and isinstance(item, h5py.Dataset):
            state[names[-1]] = torch.from_numpy(item[()])

    try:
        with opened_hdf5(path) as file:
            file.visititems(visit)
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:  # by where it is damaged
        raise UserError(f"{path} cannot be read as HDF5 ({error}); get it again, or pass another file.") from None
    return state


def _fill(network: Network, name: str, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy a backbone's state; UserError names the first tensor that does not fit, and then nothing is copied."""
    weights = _rename(name, state)
    own = network.base.state_dict()
    weights = {n: v for n, v in weights.items() if n in own or not n.startswith(network.foreign_heads)}
    if name.startswith("vit_"):
        weights = _fit_positions(network, weights)
    for key in weights:
        if key in own and weights[key].shape != own[key].shape and weights[key].numel() == own[key].numel():
            # Old ports keep batch normalisation's vectors as (1, C).
            weights[key] = weights[key].reshape(own[key].shape) if own[key].dim() == 1 else weights[key]
    missing, unknown, mismatched = compare_state(network.base, weights)
    if name in UNDERLYING and not any(key.startswith(ADDED) for key in weights):
        missing = [key for key in missing if not key.startswith(ADDED)]
    advice = "pass the weights of this backbone, or --pretrained false."
    if missing:
        raise UserError(f"{origin} has no {missing[0]!r}, which {name} needs; {advice}")
    if mismatched:
        key = mismatched[0]
        shapes = f"{tuple(weights[key].shape)} where {name} has {tuple(own[key].shape)}"
        raise UserError(f"{origin} has {key!r} of shape {shapes}; {advice}")
    if unknown:
        raise UserError(f"{origin} has {unknown[0]!r}, which {name} does not have; {advice}")
    network.base.load_state_dict(weights, strict=False)


def _rename(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of the state under the backbone's names."""
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("base.") for key in plain):
        plain = {key.removeprefix("base."): value for key, value in plain.items() if key.startswith("base.")}
    if any(key.startswith("model.") for key in plain):
        plain = {key.removeprefix("model."): value for key, value in plain.items()}
    if name.startswith("densenet"):
        # The published files are older than the module: "norm.1" is "norm1" by now.
        plain = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key): v for key, v in plain.items()}
    return plain


def _fit_positions(network: Network, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings of another image size, interpolated to this network's (as torchvision does)."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    key = "encoder.pos_embedding"
    own = network.base.get_parameter(key)
    if key not in weights or weights[key].shape == own.shape or weights[key].shape[2] != own.shape[2]:
        return weights
    size, patch = network.base.image_size, network.base.patch_size
    return dict(interpolate_embeddings(size, patch, dict(weights)))  # type: ignore[arg-type]
