"""Cross-field checks of a config: every sentence says what is wrong and what to do."""

from pathlib import Path

import torch

from metric_kd.cli.config import DistillConfig, RunConfig, TrainConfig
from metric_kd.data import DATASETS
from metric_kd.distributed import world_size
from metric_kd.errors import UserError
from metric_kd.models import check_base


def validate(config: RunConfig) -> list[str]:
    """What is wrong with a config, one sentence each; empty where nothing is. Reads no data and no weights."""
    return [sentence for check in (_names, _sizes, _schedule, _files, _device) for sentence in check(config)]


def _names(config: RunConfig) -> list[str]:
    sentences = []
    bases = [config.base, config.teacher_base] if isinstance(config, DistillConfig) else [config.base]
    for check, name in [(DATASETS.canonical, config.dataset), *((check_base, base) for base in bases)]:
        try:
            check(name)
        except UserError as error:
            sentences.append(str(error))
    return sentences


def _sizes(config: RunConfig) -> list[str]:
    sentences = []
    for key in ("batch", "num_image_per_class", "epochs", "iter_per_epoch", "eval_every"):
        if getattr(config, key) < 1:
            sentences.append(f"--{key} is {getattr(config, key)}; give 1 or more.")
    if config.num_image_per_class >= 1 and config.batch <= config.num_image_per_class:
        sentences.append(
            f"--batch {config.batch} holds fewer than two classes of --num_image_per_class {config.num_image_per_class}; "
            "raise --batch or lower --num_image_per_class."
        )
    if config.batch % world_size():
        sentences.append(f"--batch {config.batch} does not divide by {world_size()} processes; choose a multiple.")
    if config.embedding_size < 0:
        sentences.append(f"--embedding_size is {config.embedding_size}; give 0 (the pooled feature) or more.")
    sizes = {"input_size": config.input_size}
    if isinstance(config, DistillConfig):
        sizes["teacher_input_size"] = config.teacher_input_size
    sentences += [
        f"--{key} is {size}; give 8 px or more." for key, size in sizes.items() if size is not None and size < 8
    ]
    if not config.recall or min(config.recall) < 1:
        sentences.append("--recall takes one or more K of 1 or more, as in --recall 1 2 4 8.")
    if config.workers < 0:
        sentences.append(f"--workers is {config.workers}; give 0 or more.")
    return sentences


def _schedule(config: RunConfig) -> list[str]:
    sentences = []
    if not config.lr > 0:
        sentences.append(f"--lr is {config.lr}; give a positive rate.")
    for key in ("weight_decay", "warmup", "clip_norm", "save_minutes", "lr_decay_gamma"):
        if getattr(config, key) < 0:
            sentences.append(f"--{key} is {getattr(config, key)}; give 0 or more.")
    if config.warmup >= config.epochs:
        sentences.append(f"--warmup {config.warmup} leaves nothing of --epochs {config.epochs}; shorten it.")
    return sentences


def _files(config: RunConfig) -> list[str]:
    sentences = []
    if isinstance(config, DistillConfig) and config.teacher_load is None:
        sentences.append("a teacher is needed: give --teacher_load RUN_OR_FILE (run.py trains one).")
    if isinstance(config, TrainConfig) and config.mode == "eval" and config.load is None:
        sentences.append("nothing to evaluate: give --load RUN_OR_FILE.")
    chosen = config.train_classes
    if chosen is not None and not chosen.isdigit() and not Path(chosen).is_file():
        sentences.append(f"--train_classes {chosen!r} is neither a number nor a file of class names, one per line.")
    if config.pretrained not in ("auto", "true", "false") and not Path(config.pretrained).is_file():
        sentences.append(f"--pretrained {config.pretrained!r} is no file; give auto, true, false or a weights file.")
    return sentences


def _device(config: RunConfig) -> list[str]:
    if config.device == "cuda" and not torch.cuda.is_available():
        return ["--device cuda was asked for, but torch sees no CUDA device; use --device cpu or auto."]
    return []
