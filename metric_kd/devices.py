"""Where to compute, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from metric_kd.distributed import local_rank
from metric_kd.errors import UserError, one_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_CPU = frozenset({"amx_bf16", "avx512_bf16", "bf16", "sve_bf16", "svebf16"})
"""CPU features that multiply bfloat16; x86 and ARM, as PyTorch and as Linux name them."""
_CPUINFO = Path("/proc/cpuinfo")


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


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 in hardware, and PyTorch makes use of it.

    CUDA: from compute capability 8.0 on. CPU: AMX-BF16 or AVX512-BF16, on ARM BF16, through oneDNN. PyTorch computes in
    bfloat16 elsewhere too, but there it is slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and bool(BF16_CPU & _cpu_features())


def _cpu_features() -> frozenset[str]:
    """What the CPU can do, as PyTorch says it or, where PyTorch is too old to say, Linux; nothing where neither does."""
    told = getattr(torch.cpu, "get_capabilities", None)
    if told is not None:
        return frozenset(name for name, value in told().items() if value is True)
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    features = [line.partition(":") for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(features[0][2].split()) if features else frozenset()


def resolve_precision(name: str, device: torch.device) -> str:
    """auto: bf16 where the device has it in hardware, else fp32; any other name as it is."""
    if name != "auto":
        return name
    return "bf16" if has_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context in which a network computes with a precision; fp32 is no autocast."""
    if precision not in DTYPES:
        raise one_of("precision", precision, list(DTYPES))
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])
