"""Cross-field checks of a config: every sentence says what is wrong and what to do."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from metric_kd import kernels
from metric_kd.cli import also_eval, asymmetric, nested, steps, teacher_cache, unlabelled
from metric_kd.cli.config import (
    DistillConfig,
    GranularityConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
    fit_head_of,
    is_evaluation,
)
from metric_kd.cli.goals import is_number
from metric_kd.cli.losses import losses_of
from metric_kd.cli.pack import check_quality
from metric_kd.data import DATASETS
from metric_kd.devices import check_device, choose_device
from metric_kd.engine.run_directory import RunDirectory, check_folder
from metric_kd.engine.weight_record import chosen_epochs
from metric_kd.errors import UserError
from metric_kd.evaluation.metrics import titles
from metric_kd.losses.objective import Objective, option_names
from metric_kd.losses.term import TERMS, PairTerm
from metric_kd.models import check_base


def validate(config: RunConfig) -> list[str]:
    """What is wrong with a config, one sentence each; empty where nothing is. Reads no data and no weights."""
    return [
        sentence
        for check in (
            _names,
            _sizes,
            _schedule,
            _networks,
            _files,
            _device,
            _losses,
            steps.refusals,
            teacher_cache.refusals,
            unlabelled.refusals,
            asymmetric.refusals,
            nested.refusals,
            also_eval.refusals,
        )
        for sentence in check(config)
    ]


def _names(config: RunConfig) -> list[str]:
    checks: list[Callable[[], object]] = [
        lambda: DATASETS.canonical(config.dataset),
        lambda: check_base(config.base, config.input_size),
        lambda: titles(config.metrics),
    ]
    if isinstance(config, DistillConfig):
        teacher = config
        if not teacher.mutual:
            checks.append(lambda: check_base(teacher.teacher_base, teacher.teacher_input_size))
        checks += [partial(check_base, base, config.input_size) for base in teacher.mutual]
    return _refusals(checks)


def _sizes(config: RunConfig) -> list[str]:
    sentences = []
    for key in (
        "batch",
        "accumulate",
        "relation_batch",
        "num_image_per_class",
        "epochs",
        "iter_per_epoch",
        "eval_every",
    ):
        if getattr(config, key) is not None and getattr(config, key) < 1:
            sentences.append(f"--{key} is {getattr(config, key)}; give 1 or more.")
    by_class = config.task == "embedding" and not isinstance(config, GranularityConfig)
    by_class = by_class and not (unlabelled.is_unlabelled(config) or is_evaluation(config))
    key = "batch" if config.relation_batch is None else "relation_batch"
    drawn = getattr(config, key)
    if by_class and config.num_image_per_class >= 1 and drawn <= config.num_image_per_class:
        sentences.append(
            f"--{key} {drawn} holds fewer than two classes of --num_image_per_class {config.num_image_per_class}; "
            f"raise --{key} or lower --num_image_per_class."
        )
    if isinstance(config, GranularityConfig):
        for key in ("abstract_dim", "detailed_dim"):
            if getattr(config, key) < 1:
                sentences.append(f"--{key} is {getattr(config, key)}; give 1 or more.")
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
    if config.metrics and config.task == "classification":
        sentences.append("--metrics are of embeddings, a classifier has --top; leave one of --metrics and --task out.")
    if config.top and min(config.top) < 1:
        sentences.append("--top takes one or more K of 1 or more, as in --top 1 5.")
    if not 0 <= config.seed < 2**62:
        sentences.append(f"--seed is {config.seed}; give 0 or more, below 2^62.")
    if config.workers < 0:
        sentences.append(f"--workers is {config.workers}; give 0 or more.")
    return sentences


def _schedule(config: RunConfig) -> list[str]:
    sentences = []
    if config.record_weights is not None:
        asked = config.record_weights
        sentences += _refusals((lambda: chosen_epochs(asked, config.epochs),))
    if not config.lr > 0:
        sentences.append(f"--lr is {config.lr}; give a positive rate.")
    for key in ("weight_decay", "warmup", "clip_norm", "save_minutes", "lr_decay_gamma"):
        if getattr(config, key) < 0:
            sentences.append(f"--{key} is {getattr(config, key)}; give 0 or more.")
    if config.schedule == "log" and config.lr_decay_gamma == 0:
        sentences.append("--schedule log ends at --lr times --lr_decay_gamma; give a gamma above 0.")
    if any(epoch < 1 for epoch in config.lr_decay_epochs):
        sentences.append("--lr_decay_epochs counts epochs from 1; give 1 or more.")
    if any(not 0 < share < 1 for share in config.lr_decay_at or []):
        sentences.append("--lr_decay_at takes shares of the epochs between 0 and 1, as in --lr_decay_at 0.5 0.75.")
    if config.warmup >= config.epochs:
        sentences.append(f"--warmup {config.warmup} leaves nothing of --epochs {config.epochs}; shorten it.")
    return sentences


def _networks(config: RunConfig) -> list[str]:
    """Which networks a command trains, and which it needs for that."""
    sentences = []
    needs_teacher = isinstance(config, GranularityConfig) or (isinstance(config, DistillConfig) and not config.mutual)
    if fit_head_of(config) is not None:  # which may well be done from the labels alone
        needs_teacher = any(TERMS[loss.name].reads_teacher for loss in losses_of(config) if loss.weight)
    if needs_teacher and getattr(config, "teacher_load", None) is None:
        sentences.append("a teacher is needed: give --teacher_load RUN_OR_FILE (run.py trains one).")
    if isinstance(config, DistillConfig):
        if config.mutual and config.teacher_load is not None:
            sentences.append("--mutual trains peers instead of a teacher; leave --teacher_load or --mutual out.")
        rates = config.peer_lr
        if rates is not None and (len(rates) != len(config.mutual) or not all(rate > 0 for rate in rates)):
            sentences.append("--peer_lr takes one positive rate for each --mutual; give as many, or leave it out.")
        sentences += _granularity(config) + _imitation(config)
    if isinstance(config, GranularityConfig):
        for key in ("load", "student_init", "loss"):
            if getattr(config, key) is not None:
                sentences.append(f"--{key} has no meaning here: only the teacher's coders are trained; leave it out.")
    if isinstance(config, ProbeConfig):
        if config.load is None:
            sentences.append("nothing to probe: name a run or a checkpoint, as in `metric-kd probe RUN`.")
        if config.freeze_bn:
            sentences.append("a probe's backbone is frozen as it is; leave --freeze_bn out.")
    if fit_head_of(config) is not None:
        if config.load is None:
            sentences.append("--fit_head keeps layers of a trained network; give --load RUN_OR_FILE.")
        if is_evaluation(config):
            sentences.append("--fit_head trains what follows a layer; leave it or --mode eval out.")
    if isinstance(config, TrainConfig) and config.mode == "eval" and config.load is None:
        sentences.append("nothing to evaluate: give --load RUN_OR_FILE.")
    return sentences


def _files(config: RunConfig) -> list[str]:
    sentences = []
    chosen = config.train_classes
    if chosen is not None and not is_number(chosen) and not Path(chosen).is_file():
        sentences.append(f"--train_classes {chosen!r} is neither a number nor a file of class names, one per line.")
    if config.pretrained not in ("auto", "true", "false") and not Path(config.pretrained).is_file():
        sentences.append(f"--pretrained {config.pretrained!r} is no file; give auto, true, false or a weights file.")
    if config.load is not None and config.pretrained not in ("auto", "false"):
        sentences.append("--load and --pretrained both give a start; leave one of them out.")
    if config.student_init is not None:
        start = Path(config.student_init)
        if config.load is not None:
            sentences.append("--load and --student_init both give a start; leave one of them out.")
        if start.is_dir():
            sentences.append(f"--student_init {start} is a folder; give a file.")
        elif not start.exists():
            sentences += _refusals((partial(check_folder, start.parent, "--student_init"),))
    if config.pack not in (None, "auto") and not Path(str(config.pack)).is_file():
        what = "is a folder" if Path(str(config.pack)).is_dir() else "does not exist"
        sentences.append(f"--pack {config.pack} {what}; make a file with `metric-kd pack --out FILE`, or give auto.")
    if config.pack_jpeg is not None and config.pack is None:
        sentences.append("--pack_jpeg says what --pack holds; give --pack FILE or auto too.")
    sentences += _refusals((partial(check_quality, "--pack_jpeg", config.pack_jpeg),))
    if config.save_dir is not None:
        sentences += _refusals((RunDirectory(config.save_dir).check_writable,))
    return sentences


def _device(config: RunConfig) -> list[str]:
    sentences = _refusals((lambda: check_device(config.device),))
    if config.sync_bn and not sentences and choose_device(config.device).type != "cuda":
        sentences.append("--sync_bn needs CUDA, PyTorch has no such batch normalisation for the CPU; leave it out.")
    if not (sentences or is_evaluation(config)):
        sentences += _refusals((lambda: kernels.chosen(choose_device(config.device)),))
    return sentences


def _losses(config: RunConfig) -> list[str]:
    """What the objective asks of the command and of its batches."""
    if isinstance(config, GranularityConfig) or (isinstance(config, TrainConfig) and config.mode == "eval"):
        return []
    active = [loss for loss in losses_of(config) if loss.weight]
    sentences = []
    mutual = isinstance(config, DistillConfig) and bool(config.mutual)
    if mutual and not any(TERMS[loss.name].reads_teacher for loss in active):
        sentences.append("the peers learn nothing from each other; add a loss between them, as in --loss dml:1.")
    for loss in active:
        if isinstance(config, ProbeConfig) and loss.options.get("features") != "logits":
            sentences.append(
                f"a probe trains a classifier of frozen features and loss {loss.name!r} does not; leave it out."
            )
        if TERMS[loss.name].reads_teacher and not isinstance(config, DistillConfig):
            sentences.append(f"loss {loss.name!r} reads a teacher; use run_distill.py with --teacher_load.")
        if config.sync_bn and issubclass(TERMS[loss.name], PairTerm) and not TERMS[loss.name].relates:
            sentences.append(
                f"loss {loss.name!r} runs the student on images of its own, of which processes have different numbers, and "
                "--sync_bn would wait for them for ever; leave one of the two out."
            )
        if config.sync_bn and TERMS[loss.name].differentiates:
            sentences.append(
                f"loss {loss.name!r} takes gradients of gradients, which --sync_bn does not have; leave one of the two out."
            )
        compares = config.task == "embedding" and "sample" in option_names(loss.name)
        if compares and config.num_image_per_class < 2:
            sentences.append(f"loss {loss.name!r} compares images of one class; give --num_image_per_class 2 or more.")
    return sentences + _refusals((lambda: Objective(losses_of(config)),))


def _imitation(config: DistillConfig) -> list[str]:
    """--imitate and --fit_head are steps of their own, of one student."""
    if config.imitate is None and config.teacher_layer is not None:
        return ["--teacher_layer names the layer that --imitate reads of the teacher; give --imitate LAYER too."]
    if config.mutual and (config.imitate is not None or config.fit_head is not None):
        return ["--imitate and --fit_head train one student; leave them or --mutual out."]
    if config.imitate is not None and config.fit_head is not None:
        return ["--imitate trains up to a layer and --fit_head what follows it; do one run after the other."]
    if config.imitate is not None and config.granularity is not None:
        return ["--imitate learns the teacher's feature and nothing else; leave --granularity out."]
    return []


def _granularity(config: DistillConfig) -> list[str]:
    """--granularity, its file and its losses belong together."""
    losses = [loss for loss in losses_of(config) if loss.weight]
    asked = any(loss.name == "granularity" for loss in losses)
    if config.mutual:
        if config.granularity == "mas":
            return ["--granularity mas steadies the logits of a fixed teacher; with --mutual give --granularity mag."]
        if config.granularity_load is not None:
            return ["the encoders of peers are trained along with them; leave --granularity_load or --mutual out."]
        if asked and config.granularity is None:
            return ["loss 'granularity' needs encoders for the peers; give --granularity mag."]
        return []
    if config.granularity is None:
        if config.granularity_load is not None:
            return ["--granularity_load needs --granularity mag (codes) or mas (codes and a stable target)."]
        if asked:
            return ["loss 'granularity' reads the teacher's coders; give --granularity mag --granularity_load FILE."]
        return []
    if config.granularity_load is None:
        return [
            "--granularity needs the teacher's coders: run `metric-kd granularity --teacher_load ...`, then give "
            "--granularity_load FILE."
        ]
    on_logits = [loss for loss in losses if TERMS[loss.name].reads_teacher and "logits" in TERMS[loss.name].needs]
    if config.granularity == "mas" and not on_logits:
        return [
            "--granularity mas replaces the teacher's logits by the stable ones, but no loss with a weight reads them, so "
            "it would be mag; add one, as in --loss st:0.8,temperature=4, or give --granularity mag."
        ]
    return []


def _refusals(checks: Iterable[Callable[[], object]]) -> list[str]:
    """The sentences of those checks that refuse."""
    sentences = []
    for check in checks:
        try:
            check()
        except UserError as error:
            sentences.append(str(error))
    return sentences
