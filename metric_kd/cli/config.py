"""The configuration of the commands: one dataclass each, which is the flags, the YAML and the saved config.yaml."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from metric_kd.cli.flag import flag
from metric_kd.cli.quantify_config import QuantifyConfig
from metric_kd.engine.run_directory import RESUMABLE_KEYS
from metric_kd.errors import UserError


@dataclass(kw_only=True)
class RunConfig:
    """What training and distilling have in common."""

    task: Literal["embedding", "classification"] = flag(
        "embedding", "embeddings for unseen classes, or a classifier (starts from preset zoo)"
    )
    dataset: str = flag("cub200", "data set; `metric-kd list datasets`")
    data: str = flag("data", "folder in which the data set lies or lands (the CSV file for `table`)")
    train_classes: str | None = flag(
        None, "classes to train on: a number N (the first N) or a file of names; default half (classification: all)"
    )
    labels: Literal["fine", "coarse"] = flag("fine", "coarse: the 20 superclasses of cifar100")
    base: str = flag("resnet50", "backbone, with options as name:option=value; `metric-kd list backbones`")
    embedding_size: int = flag(128, "length of the embedding; 0: the pooled feature itself")
    l2normalize: bool = flag(True, "scale embeddings to length 1")
    nested: str | None = flag(
        None, "lengths as 16,32,64: losses of the embedding, and Recall@K, for these first numbers of it as well"
    )
    classifier: bool = flag(
        False, "embedding: a classifier of the training classes beside the embedding, for losses that read logits"
    )
    load: str | None = flag(None, "checkpoint or run to start from (to evaluate in eval mode)")
    student_init: str | None = flag(
        None, "file of starting weights that several runs share; written by the first of them"
    )
    batch: int = flag(
        64, "images per pass through the networks, over all processes; a step, unless a flag below says more"
    )
    accumulate: int = flag(
        1,
        "batches in a step, one after the other, their gradients averaged; losses that relate images see one batch each",
    )
    relation_batch: int | None = flag(
        None,
        "images per step whose relations losses see, a multiple of --batch; the student takes --batch at a time, twice",
    )
    num_image_per_class: int = flag(5, "images of each class in a batch (embedding)")
    epochs: int = flag(40, "epochs")
    iter_per_epoch: int | None = flag(None, "steps per epoch; default 100, for classification once through the images")
    lr: float = flag(1e-5, "learning rate")
    lr_for: list[str] = flag(
        [], "PATTERN=RATE, repeatable: --lr of a --base that the pattern fits, as in mobilenet*=0.01; --lr replaces it"
    )
    lr_decay_epochs: list[int] = flag(
        [25, 30, 35], "epochs, counted from 1, from which on the rate is multiplied by gamma"
    )
    lr_decay_at: list[float] | None = flag(
        None, "the same as shares of --epochs (0.5 0.75): the rate falls after them; replaces --lr_decay_epochs"
    )
    lr_decay_gamma: float = flag(0.5, "the factor of --lr_decay_epochs and --lr_decay_at")
    loss: list[str] | None = flag(
        None, "name:weight[,option=value], repeatable; `metric-kd list losses`, `list methods`"
    )
    recall: list[int] = flag([1], "the K of Recall@K (hit rate)")
    metrics: list[str] = flag([], "more metrics of embeddings: map@r, r_precision, precision@K, nmi")
    top: list[int] = flag([], "the K of top-K accuracy (classification); default 1 and, with enough classes, 5")
    seed: int = flag(0, "seed of everything random")
    save_dir: str | None = flag(None, "where the run goes; default runs/<command>-<dataset>-<base>-<hash>")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "fp32",
        "precision of the networks, losses stay in float32; auto: bf16 where the device has it in hardware, else fp32",
    )
    compile: bool = flag(
        False, "torch.compile the networks' passes of training; begins slowly, and the last bits are others"
    )
    workers: int = flag(0, "processes that decode images")
    pack: str | None = flag(
        None, "read images from this file of `metric-kd pack`; auto: from DATA/.packs, made where there is none"
    )
    pack_jpeg: int | None = flag(None, "quality of a --pack of JPEG images, which are not bit-equal to the files")
    input_size: int | None = flag(None, "image side in pixels; default the backbone's")
    optimizer: Literal["adam", "adamw", "sgd"] = flag("adam", "optimiser, fused (sgd: momentum 0.9)")
    nesterov: bool = flag(True, "Nesterov's form of momentum (sgd)")
    weight_decay: float = flag(1e-5, "weight decay")
    schedule: Literal["step", "cosine", "log"] = flag(
        "step", "how the learning rate falls; log: in even steps of its exponent to --lr times --lr_decay_gamma"
    )
    warmup: float = flag(0.0, "epochs of linear warm-up")
    clip_norm: float = flag(0.0, "clip the gradient to this norm; 0: never")
    freeze_bn: bool = flag(False, "keep the running statistics of batch normalisation")
    sync_bn: bool = flag(False, "statistics of batch normalisation over the batch of all processes (CUDA)")
    pretrained: str = flag("auto", "auto: ImageNet for torchvision names, none for 32-px names; true, false, or a file")
    select: Literal["last", "val", "test"] = flag(
        "last",
        "result: the last epoch; best on held-out training classes (classification: images); or best on test, the papers' habit",
    )
    eval_every: int = flag(1, "epochs between evaluations")
    also_eval: list[str] = flag(
        [], "DATASET[:DATA], repeatable: Recall@K on the test images of other data sets too, once, of the result"
    )
    log_gradients: int = flag(
        0, "steps between measurements of the share of every loss in the gradient (of what it reads); 0: none"
    )
    record_weights: str | None = flag(
        None,
        "for metric-kd quantify, keep how far the student's weights move, and itself after epochs: all, paper, or 0,5,10",
    )
    resume: Literal["auto", "never"] = flag("auto", "continue the run in save_dir, or start it over")
    save_minutes: float = flag(10.0, "checkpoint at least this often")
    dry_run: bool = flag(False, "check everything, take one step in a child process, report its memory and time")
    skip_unreadable: bool = flag(False, "count and skip images that cannot be read")
    deterministic: bool = flag(False, "repeat bit for bit on CUDA too, more slowly")
    plugins: list[str] = flag([], "Python files or modules that register your own losses, data sets or backbones")


FIT_HEAD = (
    "a layer's name, or auto (the one that --load has imitated): keep the network of --load up to it as it is and train "
    "what follows"
)


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """run.py: train or evaluate one network."""

    mode: Literal["train", "eval"] = flag("train", "train, or evaluate --load")
    sample: str = flag("all", "triplet sampler of the triplet and contrastive losses; `metric-kd list samplers`")
    margin: float = flag(0.2, "margin of the triplet and contrastive losses")
    fit_head: str | None = flag(None, FIT_HEAD)


@dataclass(kw_only=True)
class DistillConfig(RunConfig):
    """run_distill.py: distil a teacher into a student, or let networks teach each other (--mutual)."""

    lr: float = flag(1e-4, "learning rate")
    epochs: int = flag(80, "epochs")
    lr_decay_epochs: list[int] = flag([40, 60], "epochs, counted from 1, from which on the rate is multiplied by gamma")
    lr_decay_gamma: float = flag(0.1, "the factor of --lr_decay_epochs and --lr_decay_at")
    teacher_base: str = flag("resnet50", "the teacher's backbone, for a plain state dict; a checkpoint knows its own")
    teacher_embedding_size: int = flag(128, "likewise its embedding size")
    teacher_l2normalize: bool = flag(True, "likewise whether its embeddings have length 1")
    teacher_load: str | None = flag(
        None,
        "the teacher: a run, a checkpoint, a state dict, or FILE.npy of embeddings with their paths in FILE.csv "
        "(required without --mutual)",
    )
    teacher_cache: str | None = flag(
        None, "ask the teacher once and keep its answers in this file, made where there is none (with --views)"
    )
    teacher_check: bool = flag(
        True, "before training, warn of a collapsed teacher, of its scale, and of images that are there twice"
    )
    views: int = flag(0, "show every training image in this many fixed crops; 0: in new ones every epoch")
    view_seed: int = flag(0, "seed of the fixed crops; runs of several --seed share them")
    unlabelled: bool = flag(
        False,
        "--data is any folder of images, without classes; measured by the neighbours that student and teacher share",
    )
    teacher_input_size: int | None = flag(None, "image side for the teacher; default the size it was trained with")
    mutual: list[str] = flag(
        [], "instead of a teacher, backbone of a peer that is trained along (repeatable); default loss dml:1"
    )
    peer_lr: list[float] | None = flag(
        None, "learning rates of the peers; default what --lr_for has for their backbones, else --lr"
    )
    triplet_ratio: float = flag(0.0, "weight of the triplet loss (l2_triplet)")
    triplet_sample: str = flag("distance", "triplet sampler; `metric-kd list samplers`")
    triplet_margin: float = flag(0.2, "margin of the triplet loss")
    dist_ratio: float = flag(0.0, "weight of rkd_distance")
    angle_ratio: float = flag(0.0, "weight of rkd_angle")
    dark_ratio: float = flag(0.0, "weight of dark_rank")
    dark_alpha: float = flag(2.0, "scale of dark_rank's scores")
    dark_beta: float = flag(3.0, "exponent of dark_rank's scores")
    at_ratio: float = flag(0.0, "weight of at, summed over the last three stages")
    fitnet_ratio: float = flag(0.0, "weight of fitnet, with trained 1x1 convolutions")
    granularity: Literal["mag", "mas"] | None = flag(
        None, "mag: add the term granularity; mas: and make the average of teacher and decoders the target of logits"
    )
    granularity_load: str | None = flag(None, "the teacher's coders: a run of `metric-kd granularity`, or its best.pth")
    eval: Literal["symmetric", "asymmetric"] = flag(
        "symmetric", "asymmetric: also Recall@K of the student's queries in the teacher's gallery, and select by it"
    )
    bridge: Literal["none", "ridge", "procrustes"] = flag(
        "none", "after training, fit a map from the student's space into the teacher's and keep it in best.pth"
    )
    imitate: str | None = flag(
        None,
        "a layer's name (conv, fc1, pooled, embedding, base.layer3.0.conv1, ...): learn that feature of the teacher alone",
    )
    teacher_layer: str | None = flag(None, "its name in the teacher, where that is another")
    fit_head: str | None = flag(None, FIT_HEAD)


@dataclass(kw_only=True)
class GranularityConfig(RunConfig):
    """metric-kd granularity: fit the coders of a teacher for run_distill.py --granularity."""

    teacher_load: str | None = flag(None, "the teacher: a run, a checkpoint or a state dict (required)")
    abstract_dim: int = flag(64, "length of the abstract code")
    detailed_dim: int = flag(256, "length of the detailed code")
    lr: float = flag(0.01, "learning rate")
    epochs: int = flag(60, "epochs")
    optimizer: Literal["adam", "adamw", "sgd"] = flag("sgd", "optimiser, fused (sgd: momentum 0.9)")
    nesterov: bool = flag(False, "Nesterov's form of momentum (sgd)")
    weight_decay: float = flag(5e-4, "weight decay")
    lr_decay_epochs: list[int] = flag([], "epochs, counted from 1, from which on the rate is multiplied by gamma")
    lr_decay_at: list[float] | None = flag([0.5, 0.75], "the same as shares of --epochs")
    lr_decay_gamma: float = flag(0.1, "the factor of --lr_decay_epochs and --lr_decay_at")
    eval_every: int = flag(10, "epochs between evaluations of the decoders")


@dataclass(kw_only=True)
class ProbeConfig(RunConfig):
    """metric-kd probe RUN: a linear classifier on the frozen backbone of RUN (or of --load), on other images; preset probe."""

    task: Literal["classification"] = flag("classification", "a probe is a classifier")  # type: ignore[assignment]
    dataset: str = flag("stl10", "data set; `metric-kd list datasets`")
    flip: bool = flag(True, "mirror training images at random, where the data set allows it")


COMMANDS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "distill": DistillConfig,
    "granularity": GranularityConfig,
    "probe": ProbeConfig,
    "quantify": QuantifyConfig,
}


NETWORK_FIELDS = ("base", "embedding_size", "l2normalize", "input_size")
"""What describes a network; with the prefix teacher_ the teacher."""


def with_rate(config: RunConfig) -> RunConfig:
    """``lr`` as the first fitting entry of ``lr_for`` has it; doing so twice changes nothing."""
    name = config.base.partition(":")[0]
    for entry in reversed(config.lr_for):
        pattern, _, rate = entry.partition("=")
        try:
            value = float(rate)
        except ValueError:
            value = math.nan
        if not (pattern and value > 0 and math.isfinite(value)):
            raise UserError(f"--lr_for {entry!r} is no rule; write PATTERN=RATE, as in mobilenet*=0.01.")
        if fnmatchcase(name, pattern):
            config = replace(config, lr=value)
    return config


def is_evaluation(config: RunConfig) -> bool:
    return isinstance(config, TrainConfig) and config.mode == "eval"


def array_of(config: RunConfig) -> str | None:
    """The file of embeddings that is the teacher; None where that is a network, or there is none."""
    path = config.teacher_load if isinstance(config, DistillConfig) else None
    return path if path is not None and path.endswith(".npy") else None


def fit_head_of(config: RunConfig) -> str | None:
    """The layer after which a run trains (--fit_head); None where it trains all."""
    return getattr(config, "fit_head", None)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values, as config.yaml stores them: what repeats the run, without what says how this start treats it."""
    return {key: value for key, value in asdict(config).items() if key not in ("resume", "dry_run")}


def known_keys(command: str) -> list[str]:
    return [f.name for f in fields(COMMANDS[command])]


def default_save_dir(command: str, config: RunConfig) -> str:
    """runs/<command>-<dataset>-<base>-<hash of the config, without what may differ between start and resume>."""
    content = {key: value for key, value in to_dict(config).items() if key not in RESUMABLE_KEYS}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    base = config.base.replace(":", "-").replace("=", "").replace(",", "-").replace("/", "-")
    return f"runs/{command}-{config.dataset}-{base}-{digest}"
