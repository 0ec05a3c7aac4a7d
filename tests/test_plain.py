"""HDF5 files that lead to other files, or in circles."""

import h5py
import numpy as np
import pytest

from metric_kd.plain import opened_hdf5


def test_an_hdf5_file_leads_to_no_other_file(tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros(3)
    (tmp_path / "raw").write_bytes(bytes(24))

    def virtual(file):
        layout = h5py.VirtualLayout(shape=(3,), dtype="f8")
        layout[:] = h5py.VirtualSource(str(other), "x", shape=(3,))
        file.create_virtual_dataset("v", layout)

    makers = {
        "external link": lambda file: file.__setitem__("a/b", h5py.ExternalLink(str(other), "x")),
        "soft link": lambda file: file.__setitem__("a/b", h5py.SoftLink("/y")),
        "storage": lambda file: file.create_dataset("a/b", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)]),
        "virtual": virtual,
    }
    for name, make in makers.items():
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        with pytest.raises(ValueError, match="is a link|in another file"), opened_hdf5(path):
            pass
    with h5py.File(tmp_path / "round.h5", "w") as file:
        file["g/x"] = np.ones(2)
        file["g/again"] = file["g"]
    with opened_hdf5(tmp_path / "round.h5") as content:
        assert content["g/again/again/x"][()].tolist() == [1, 1]
