"""Whose a file is: one in the folder of a run is read, whoever passes it; only files of the user's own may name plugins."""

import os
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (".pth", ".pt", ".pt2", ".ckpt", ".onnx", ".safetensors")
"""How files of weights end, beside which a YAML file is a run's."""
RESULTS = ("best.pth", "last.pth")
TRACES = ("card.json", "metrics.jsonl", "result.txt", ".lock")


def in_a_run(file: "str | Path") -> bool:
    """Whether a file lies in the folder of a run, by its path as it is spelt, as it is, or by a link on the way."""
    return any(_beside_weights(place.parent) or any(map(_is_run, place.parents)) for place in _places(Path(file)))


def _places(file: Path) -> Iterator[Path]:
    place = Path(os.path.abspath(file))
    yield place.resolve()
    for _ in range(40):  # as many links as Linux follows
        yield place
        yield place.parent.resolve() / place.name
        if not place.is_symlink():
            return
        place = Path(os.path.abspath(place.parent.resolve() / os.readlink(place)))


def _is_run(folder: Path) -> bool:
    if any((folder / name).is_file() for name in RESULTS):
        return True
    return (folder / "config.yaml").is_file() and any((folder / name).exists() for name in TRACES)


def _beside_weights(folder: Path) -> bool:
    places = (folder, folder / "weights", folder / "checkpoints")
    return any(entry.suffix in WEIGHTS for place in places if place.is_dir() for entry in place.iterdir())
