"""Where to compute, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from metric_kd.distributed import local_rank
from metric_kd.errors import UserError, one_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(name: str) -> None:
    """Raise ``UserError`` where CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto.")


def choose_device(name: str) -> torch.device:
    """auto: CUDA where there is some; in a group of processes each takes its own."""
    check_device(name)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a network computes with a precision; fp32 is no autocast."""
    if precision not in DTYPES:
        raise one_of("precision", precision, list(DTYPES))
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])
