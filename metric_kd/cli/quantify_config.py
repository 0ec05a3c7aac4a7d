"""The configuration of `metric-kd quantify`."""

from dataclasses import dataclass
from typing import Literal

from metric_kd.cli.flag import flag
from metric_kd.quantify.concepts import THRESHOLD
from metric_kd.quantify.search import Search


@dataclass(kw_only=True)
class QuantifyConfig:
    """metric-kd quantify: what distillation taught, by the concepts in a layer: how many, how soon, how stably."""

    teacher: str | None = flag(None, "the teacher: a run or a checkpoint")
    distilled: str | None = flag(None, "the distilled student: a run trained with --record_weights, or a checkpoint")
    baseline: str | None = flag(None, "the same student trained without the teacher, likewise")
    layer: str = flag("embedding", "where to look: embedding, pooled, logits, conv, fc1, ..., or a module's path")
    teacher_layer: str | None = flag(None, "its name in the teacher, where that is another")
    images: str | None = flag(None, "folder of images; default training images of the distilled run (else of another)")
    masks: str = flag(
        "central",
        "foreground: central (the middle two thirds), a folder of segmentations, a CSV of boxes, or bounding_boxes.txt",
    )
    view: Literal["whole", "crop"] = flag("whole", "the whole image, shrunk, or the centre crop of the network's test")
    count: int = flag(50, "images to look at, drawn at random")
    epochs: str | None = flag(None, "recorded epochs to look at, as in 0,5,10; default all that were recorded")
    grid: int = flag(Search.grid, "cells along a side of an image")
    draws: int = flag(Search.draws, "noise images per iteration")
    antithetic: bool = flag(False, "draw noise in pairs of opposite sign: less spread at the same cost")
    iterations: int = flag(Search.iterations, "iterations of the search")
    lam: float | None = flag(None, "weight of the entropy; default 7 (the reference has 6 for ResNets)")
    target: float = flag(Search.target, "mean entropy, in nats, at which maps are compared")
    form: Literal["reference", "paper"] = flag(
        "reference", "the search of the authors' program, or of the paper's text"
    )
    relu: Literal["auto", "true", "false"] = flag("auto", "look behind a ReLU; auto: but for embeddings")
    threshold: float = flag(THRESHOLD, "nats by which a concept keeps more than the background")
    background: Literal["dataset", "image"] = flag(
        "dataset", "the background's entropy: its mean over all images (the program), or each image's own (the paper)"
    )
    distance: Literal["step", "epoch"] = flag(
        "step", "how far weights moved in an epoch: over all its steps (the program), or from end to end (the paper)"
    )
    empty: Literal["skip", "zero"] = flag(
        "skip", "an image without any concept is left out of D and rho, or counts as 0"
    )
    pictures: int = flag(4, "images to show on the page")
    batch: int | None = flag(None, "noisy images per forward pass; default by their size")
    skip_unreadable: bool = flag(False, "leave out images that cannot be read")
    seed: int = flag(0, "seed of the choice of images and of the noise")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    plugins: list[str] = flag([], "Python files or modules that the runs were made with, to import")
    out: str | None = flag(None, "folder of the results; default runs/quantify-<hash of the flags>")
    resume: Literal["auto", "never"] = flag("auto", "go on with the maps in --out, or start over")
    dry_run: bool = flag(False, "check everything, print what would be done")
