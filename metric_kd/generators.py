"""The generators that a step draws from, torch's, NumPy's and Python's, as one thing."""

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Begin all of them anew, on every device; 0 <= seed < 2^63, of which NumPy takes the lower 32 bits."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def states_of(device: torch.device) -> tuple[Any, ...]:
    """Where those stand that a step on a device draws from."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, np.random.get_state(), random.getstate()


def restore(states: tuple[Any, ...], device: torch.device) -> None:
    """The inverse of :func:`states_of`."""
    on_cpu, on_device, numpy, python = states
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
    np.random.set_state(numpy)
    random.setstate(python)
