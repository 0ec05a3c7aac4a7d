"""Random states and the facts about a machine on which bit-equal repetition depends."""

import hashlib
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from metric_kd import kernels
from metric_kd.distributed import seed_common, world_size
from metric_kd.generators import seed_all
from metric_kd.version import __version__


def seed_step(seed: int, step: int, rank: int, part: int = 0) -> None:
    """Seed every generator for one step, or for one of the batches that make up a step (``part``).

    What a step draws then depends on (seed, step, rank) alone, so that a run resumed anywhere repeats it, whatever was
    drawn in between by loaders or evaluation. Draws that all processes must share depend on (seed, step) and are those of
    rank 0 (:func:`~metric_kd.distributed.common_draws`).
    """
    later = (part,) if part else ()
    value = _seed_of(seed, step, rank, *later)
    seed_all(value)
    seed_common(_seed_of(seed, step, 0, *later))


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_states() -> dict[str, Any]:
    """The state of all generators, as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads and device: equal environments give bit-equal runs."""
    return {
        "metric_kd": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.described(device),
    }


def weights_digest(network: nn.Module) -> str:
    """16 hex digits over all weights of a network: a teacher that was trained again is another teacher."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@contextmanager
def sums_in_order(device: torch.device) -> Iterator[None]:
    """On the CPU, let gradients of gathered rows, as of ``x[rows]``, be summed in one order on several threads too.

    PyTorch's threads otherwise add them as they come, and a step would not repeat itself. CUDA is left to
    :func:`deterministic_algorithms`, which costs more there.
    """
    if device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def deterministic_algorithms() -> None:
    """Make CUDA repeat itself bit for bit, at some cost in speed."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
