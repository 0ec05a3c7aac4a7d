"""Small data and small runs that many tests share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
THREADS = os.environ.get("METRIC_KD_TEST_THREADS", "1")
"""Of PyTorch, in tests and in the processes that they start; tests/machines.py runs them on more."""


def write_images(folder: Path, classes: int, per_class: int, size: int = 32, seed: int = 0) -> Path:
    """A folder of class folders: each class a coloured pattern, each image a noisy copy of it."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for c in range(classes):
        pattern = generator.integers(0, 256, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
        (folder / f"class{c:02d}").mkdir(parents=True)
        for k in range(per_class):
            noisy = np.clip(pattern + generator.normal(0, 40, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"class{c:02d}" / f"{k:02d}.png")
    return folder


TINY = [
    "--dataset", "folder", "--base", "resnet8_x0.5:stem_stride=2", "--embedding_size", "8", "--batch", "12",
    "--num_image_per_class", "3", "--iter_per_epoch", "4", "--epochs", "2", "--lr", "0.01", "--device", "cpu",
]  # fmt: skip
"""Flags of a run that takes a second."""


def command(script: str, *flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the top-level scripts in its own process."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": THREADS},
        timeout=200,
    )


def succeeds(code: str) -> None:
    """Run Python code in a process of its own, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def start(arguments: list[str]) -> subprocess.Popen:
    """run.py in a process of its own, which a test may kill; what it says comes through ``stdout``."""
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
