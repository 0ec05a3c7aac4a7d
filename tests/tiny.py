"""Small data and small runs that many tests share."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import template
from template import THREADS as THREADS
from template import Forked

ROOT = Path(__file__).resolve().parent.parent


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


def command(name: str, *flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run one of the top-level scripts in its own process."""
    return template.completed(Forked(template.script, str(ROOT / name), *map(str, flags), cwd=cwd))


def succeeds(code: str) -> None:
    """Run Python code in a fresh interpreter, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def start(arguments: list[str]) -> Forked:
    """run.py in a process of its own, which a test may kill; ``communicate`` gives what it says."""
    return Forked(template.script, str(ROOT / "run.py"), *arguments, cwd=ROOT, merged=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launched(name: str, *flags: object, processes: int = 2, **env: str) -> list[subprocess.CompletedProcess]:
    """Run one of the top-level scripts in processes with the variables that torchrun gives them."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), **env}
    words = [str(ROOT / name), *map(str, flags)]
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Forked(template.script, *words, cwd=ROOT, env=own) for own in ranks]
    try:
        return [template.completed(process) for process in started]
    finally:
        for process in started:  # where one hangs the others would wait for it for ever
            process.kill()
