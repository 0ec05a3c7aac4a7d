"""Fixtures that all tests share."""

from pathlib import Path

import pytest
import torch
from tiny import THREADS, TINY, write_images


@pytest.fixture(autouse=True)
def one_thread():
    """Tests share two cores; tiny networks are fastest, and repeatable, on one thread (or those asked for)."""
    torch.set_num_threads(int(THREADS))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=8, per_class=8)


@pytest.fixture(scope="session")
def teacher_run(image_folder, tmp_path_factory) -> Path:
    """A tiny trained teacher."""
    from metric_kd.cli.train import main

    run = tmp_path_factory.mktemp("teacher") / "run"
    torch.set_num_threads(int(THREADS))
    main(
        [
            *TINY,
            "--base",
            "resnet8:stem_stride=2",
            "--embedding_size",
            "16",
            "--data",
            str(image_folder),
            "--save_dir",
            str(run),
        ]
    )
    return run
