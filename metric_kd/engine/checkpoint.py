"""Files that hold weights: written whole or not at all, read without running code that they contain."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metric_kd import scratch
from metric_kd.durable import sync_folder, umask
from metric_kd.engine.run_plugins import explained
from metric_kd.errors import UserError
from metric_kd.models.network import Network, NetworkSpec, build_network, load_weights
from metric_kd.models.weight_file import read_tensors, seal_archive

FORMAT = "metric_kd checkpoint 1"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write(file)`` on a temporary neighbour, flush it to the disk, and rename it over ``path``.

    After a crash at any moment ``path`` is either the old file or the new one.
    """
    path = Path(path)
    handle, temporary = scratch.create(path)
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a dict of tensors and plain values atomically, sealed with its digest."""

    def write(file: BinaryIO) -> None:
        torch.save({"format": FORMAT, **content}, file)
        seal_archive(file)

    write_atomically(path, write)


def read_checkpoint(path: "Path | str", role: str = "checkpoint") -> dict[str, Any]:
    """The content of a checkpoint file, or of a plain state dict under the key "model".

    A directory stands for the run in it (best.pth, else last.pth). Only tensors and plain values are unpickled, and only
    where the file's digest is right, or its checksums where it has no digest. Raises ``UserError``, naming the file as
    ``role``, where it is missing, damaged or no checkpoint.
    """
    path = find_checkpoint(path, role)
    try:
        content = read_tensors(path, f"the {role} {path}", "copy it again or train again")
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the {role} {path} is no checkpoint of tensors and plain values, or was damaged; "
            "give a file that metric_kd or torch.save(model.state_dict()) wrote."
        ) from error
    except Exception as error:  # a damaged file raises what its bytes lead to: EOFError, IndexError, zlib.error, ...
        raise UserError(f"the {role} {path} cannot be read, it seems truncated or damaged; copy it again.") from error
    if isinstance(content, dict) and content.get("format") == FORMAT:
        return content
    if isinstance(content, dict) and isinstance(content.get("format"), str):
        raise UserError(f"the {role} {path} has format {content['format']!r}, this version reads {FORMAT!r}; update.")
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not (isinstance(content, dict) and content and all(isinstance(v, torch.Tensor) for v in content.values())):
        raise UserError(f"the {role} {path} holds no state dict; give a file of named tensors.")
    return {"model": {key.removeprefix("module."): value for key, value in content.items()}}


def find_checkpoint(path: "Path | str", role: str = "checkpoint") -> Path:
    """The file behind a path: itself, or a run directory's best.pth or last.pth."""
    path = Path(path)
    if path.is_dir():
        for name in ("best.pth", "last.pth"):
            if (path / name).is_file():
                return path / name
        raise UserError(f"the {role} {path} is a folder without best.pth or last.pth; give a finished run or a file.")
    if not path.is_file():
        if path.exists():
            raise UserError(f"the {role} {path} is neither a file nor a folder; give a run or a file.")
        raise UserError(f"the {role} {path} does not exist; check the path.")
    return path


def describe_mismatch(spec: NetworkSpec, flags: dict[str, Any], role: str) -> None:
    """Refuse flags that contradict what a checkpoint says of its network. ``flags``: spec field -> given value."""
    for field, value in flags.items():
        stored = getattr(spec, field)
        if stored != value:
            raise UserError(
                f"the {role} is a {spec.base} network with {field} {stored}, but the flags say {value}; "
                "leave the flag out or give the matching file."
            )


def restore_network(
    path: "Path | str", fallback: NetworkSpec | None, given: dict[str, Any], role: str = "checkpoint"
) -> Network:
    """The network in a checkpoint, with its weights.

    A checkpoint of ours describes its network; ``given`` (the flags that the user set, by spec field) must agree. A
    plain state dict (``base.*``, ``linear.*``) is loaded into ``fallback``, and refused where there is none.
    """
    content = read_checkpoint(path, role)
    if "coders" in content:
        raise UserError(
            f"the {role} {path} holds the coders of a teacher, not a network; give it as --granularity_load."
        )
    if "network" not in content and fallback is None:
        raise UserError(
            f"the {role} {path} is a plain state dict, which does not say what network it belongs to; give a run or a "
            "checkpoint of this program."
        )
    spec = fallback
    if "network" in content:
        spec = NetworkSpec.from_dict(content["network"])
        describe_mismatch(spec, given, role)
    assert spec is not None
    with explained(path):
        network = build_network(spec)
    try:
        load_weights(network, content["model"], strict=True)
    except UserError as error:
        raise UserError(f"the {role} {path} does not fit the network that the flags describe: {error}") from error
    return network
