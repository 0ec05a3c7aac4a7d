"""Large tensors in memory that is used again: a new one costs more in page faults than the arithmetic that fills it."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNED = 64
"""Bytes to whose multiples PyTorch aligns its own tensors: kernels are faster so, and some give other bits."""


class LentMemory:
    """Lends memory as tensors on the CPU, and takes it back when the last tensor, view or autograd graph on it is gone.

    A tensor of :meth:`empty` may therefore be kept as long as any other; nobody writes into it meanwhile. PyTorch's
    storage holds the NumPy array that it was made from, and the death of that array is what is waited for. At most
    ``kept`` pieces of up to ``largest`` bytes wait for the next borrower. Threads may borrow at the same time.
    """

    def __init__(self, kept: int = 2, largest: int = 1 << 28):
        self.kept, self.largest = kept, largest
        self._free: dict[int, np.ndarray] = {}

    def empty(self, shape: Sequence[int]) -> Tensor:
        """A contiguous float32 tensor with whatever is in it."""
        size = int(np.prod(shape))
        if not 0 < 4 * size <= self.largest:
            return torch.empty(*shape)
        memory = self._take(size)
        lent = memory[:size]
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent).view(*shape)

    def _take(self, size: int) -> np.ndarray:
        for key, memory in reversed(self._free.copy().items()):
            if size <= memory.size <= 2 * size and self._free.pop(key, None) is not None:  # or another thread has it
                return memory
        memory = np.empty(size + ALIGNED // 4, dtype=np.float32)
        return memory[-memory.ctypes.data % ALIGNED // 4 :][:size]

    def _give_back(self, memory: np.ndarray) -> None:
        self._free[id(memory)] = memory
        while len(self._free) > self.kept:
            self._free.pop(next(iter(self._free.copy()), 0), None)
