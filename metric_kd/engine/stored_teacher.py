"""What a frozen teacher said of every training image, read instead of running it."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from metric_kd.types import Batch, Output

ON_DEVICE = 1 << 30
"""Bytes up to which a field is copied to the device, where its rows are found without a wait for the device."""
FIELDS = ("embedding", "logits")
"""What can be stored; maps would fill disks."""


class StoredTeacher:
    """A teacher without a network: neither a module nor in any state dict, it only answers for known images.

    fields: name -> (M, V, D) floating point, row by row what was said of the V fixed views; rows: (N,) which of the M is
    each of the N training images, default in order. With V = 1 whatever is shown of an image has the same answer. about:
    what a run records of it, the digest of its weights or vectors under "teacher"; held_out: name of a loader -> (H, D)
    embeddings of the test view of its images.
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        about: Mapping[str, str],
        rows: np.ndarray | None = None,
        held_out: Mapping[str, Tensor] | None = None,
    ):
        self.about, self.held_out = dict(about), dict(held_out or {})
        self.provides = frozenset(fields)
        self.views = next(iter(fields.values())).shape[1]
        self._tables = {name: torch.from_numpy(_flat(table)) for name, table in fields.items()}
        self._rows = None if rows is None else torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))

    def outputs_of(self, batch: Batch, needs: "tuple[str, ...]") -> Output:
        """The fields of ``needs`` for the images of a batch, float32 and without gradient, on the device of its indices."""
        device = batch.indices.device
        if device.type != "cpu":
            self._move(device)
        rows = batch.indices if self._rows is None else self._rows[batch.indices.to(self._rows.device)]
        if self.views > 1:
            assert batch.views is not None
            rows = rows * self.views + batch.views.to(rows.device)
        found = {name: self._tables[name][rows.to(self._tables[name].device)] for name in needs}
        return Output(**{name: values.to(device, torch.float32) for name, values in found.items()})  # type: ignore[arg-type]

    def _move(self, device: torch.device) -> None:
        """Copy what is small enough to a device, once."""
        if self._rows is not None:
            self._rows = self._rows.to(device)
        for name, table in self._tables.items():
            if table.device != device and table.nbytes <= ON_DEVICE:
                self._tables[name] = table.to(device)


def _flat(table: np.ndarray) -> np.ndarray:
    """(M, V, D) to (M V, D) without a copy, as a plain array: slices of a memory map are slow to make."""
    plain = np.asarray(table)
    return plain.reshape(-1, plain.shape[2])
