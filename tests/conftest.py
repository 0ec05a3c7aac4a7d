"""Fixtures that all tests share."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import template
import torch
from tiny import THREADS, TINY, write_images

LONG = [
    "docs/test_docs.py", "cli/test_export_command.py", "engine/test_stages.py", "deploy/test_export.py",
    "engine/test_resume.py", "engine/test_precision.py", "distill/test_any_pair.py", "engine/test_distributed.py",
    "cli/test_compare.py", "test_benchmarks.py", "docs/test_readme.py", "engine/test_teacher_cache.py",
]  # fmt: skip
"""The files that take longest. They come first, so that no worker is left alone with one at the end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(autouse=True)
def one_thread():
    """Tests share two cores; tiny networks are fastest, and repeatable, on one thread (or those asked for)."""
    torch.set_num_threads(int(THREADS))


@pytest.fixture(autouse=True)
def forked_trials(monkeypatch):
    """The child of --dry_run is forked from the template; a module that overrides this has one as users have it."""
    if "metric_kd.cli.dry_run" in sys.modules:
        context = SimpleNamespace(get_context=lambda method: template.ready())
        monkeypatch.setattr("metric_kd.cli.dry_run.multiprocessing", context)


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
