"""Compiled kernels, chosen where their compiler is installed: which one runs, and what it is called in a run's record.

``METRIC_KD_KERNELS``: ``auto`` (the default) takes numba on the CPU and Triton for float32 on CUDA, each where it is
installed, and PyTorch elsewhere; ``off`` or ``torch`` takes PyTorch; ``numba`` or ``triton`` insists on one and raises
``UserError`` where it cannot run. No compiler is imported before its kernel is first used. Where one fails at that
point, PyTorch takes over with one warning, unless the kernel was insisted on.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from metric_kd.errors import UserError, one_of

VARIABLE = "METRIC_KD_KERNELS"
AUTO = "auto"
TORCH = ("off", "torch")
COMPILERS = {"numba": "pip install 'metric_kd[fast]'", "triton": "install the CUDA build of PyTorch, which brings it"}

_failed: set[str] = set()
"""Compilers whose kernel could not be had in this process."""


def chosen(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """torch, numba or triton: what computes on such tensors. ``UserError`` where the variable asks for what is not."""
    wish = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    if wish in TORCH:
        return "torch"
    if wish in COMPILERS:
        _check(wish, device)
        return wish
    if wish != AUTO:
        raise one_of(VARIABLE, wish, [AUTO, *TORCH, *COMPILERS])
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        name = "numba"
    elif device.type == "cuda" and dtype == torch.float32:
        name = "triton"
    else:
        return "torch"
    return name if _installed(name) and name not in _failed else "torch"


def described(device: torch.device) -> str:
    """What :func:`chosen` says of float32, with its version: kernels decide the last bits of a run."""
    name = chosen(device)
    if name == "torch":
        return name
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:  # some builds of triton carry another distribution name
        return name


def angle_gap(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """(loss, gradient) of the angle loss from squared distances, by the chosen kernel; None where PyTorch is to do it.

    See ``distill.relational.rkd_angle.angle_gap``.
    """
    if torch.compiler.is_compiling():
        return None  # PyTorch's own compiler sees PyTorch's own operations
    name = chosen(u.device, u.dtype)
    if name == "torch":
        return None
    try:
        return _angle_kernel(name)(u, v)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if os.environ.get(VARIABLE, "").strip().lower() == name:
            raise UserError(f"{VARIABLE}={name} was asked for, but its kernel failed ({said}); unset it.") from error
        _failed.add(name)
        warnings.warn(
            f"the {name} kernel of the angle loss failed ({said}); PyTorch computes it from here on.", stacklevel=2
        )
        return None


@cache
def _angle_kernel(name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if name == "numba":
        from metric_kd.kernels import angle_numba

        return angle_numba.angle_gap
    from metric_kd.kernels import angle_triton

    return angle_triton.angle_gap


def _check(name: str, device: torch.device) -> None:
    """Raise ``UserError`` where a compiler that was insisted on is absent, or cannot serve the device."""
    if not _installed(name):
        raise UserError(
            f"{VARIABLE}={name} was asked for, but {name} is not installed; {COMPILERS[name]}, or unset the variable."
        )
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if name == "numba" else "cuda") and not interpreted:
        place = "the CPU" if name == "numba" else "CUDA"
        raise UserError(f"{VARIABLE}={name} was asked for, but it serves {place} and this is {device}; unset it.")


@cache
def _installed(name: str) -> bool:
    return find_spec(name) is not None
