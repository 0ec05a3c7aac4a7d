"""evaluate_classification: the top-k accuracy of one network's logits over a loader."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from metric_kd.devices import autocast
from metric_kd.distributed import copy_from_main, gather_objects
from metric_kd.errors import UserError
from metric_kd.evaluation.embed import with_bar
from metric_kd.modes import eval_mode
from metric_kd.types import Batch

DEFAULT_TOP = (1, 5)


def default_top(num_classes: int) -> tuple[int, ...]:
    """Top-1, and top-5 where it can fail: among more than five classes."""
    return tuple(k for k in DEFAULT_TOP if k == 1 or k < num_classes)


def check_top(ks: Iterable[int], num_classes: int) -> None:
    """Raise ``UserError`` where a k of top-k accuracy cannot be; cheap, to be called before long work."""
    ks = list(ks)
    if not ks:
        raise UserError("top-k accuracy needs at least one k, as in 1 5.")
    for k in ks:
        if k != int(k) or k < 1:
            raise UserError(f"k = {k} is not possible in top-k accuracy; give whole numbers of 1 or more.")
        if k > num_classes:
            raise UserError(f"top-{k} accuracy needs {k} classes and there are {num_classes}; choose a smaller k.")


def topk_accuracy(logits: Tensor, labels: Tensor, ks: Sequence[int] | None = None) -> dict[str, float]:
    """{"top<k>": fraction of rows whose class is among the k largest logits}.

        top-k = 1/N sum_n clamp((k - above_n) / equal_n, 0, 1)

    logits: (N, K), halves raised to float32; labels: (N,) in 0 .. K-1. ks: (1, 5) without what K classes make
    certain, by default. above_n counts the logits above that of the label, equal_n those equal to it, its own
    included: a tie gets what a fair draw among the equals would get on average, so that neither the order of the
    classes nor the coarse steps of bf16 help or hurt, and a network that says the same of every class has k/K. A row
    with a NaN is a miss. Raises ``UserError`` for a k that cannot be, labels that are no class, and no rows.
    """
    num_classes = logits.shape[1]
    ks = default_top(num_classes) if ks is None else ks
    check_top(ks, num_classes)
    if len(logits) == 0:
        raise UserError("there are no logits to count; check that the data set is not empty.")
    _check_labels(labels, num_classes)
    hits = _hits(logits, labels, ks)
    return {f"top{k}": float(hit) / len(logits) for k, hit in zip(ks, hits, strict=True)}


def evaluate_classification(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    ks: Sequence[int] | None = None,
    progress: str | None = None,
    total: int | None = None,
    shared: bool = False,
) -> dict[str, float]:
    """:func:`topk_accuracy` of ``network(images, want=("logits",))`` over all batches, without keeping the logits.

    The network is where ``device`` says and in eval mode meanwhile; every module gets back the mode that it had.
    precision: "fp32", "bf16" or "fp16" (autocast). progress: the title of a bar on stderr over ``total`` batches. shared:
    ``batches`` are this process's part of those of all processes, which call this together and get the accuracy over all.
    Raises ``UserError`` for an unknown precision, where there are no batches, and as :func:`topk_accuracy` does.
    """
    device = torch.device(device)
    hits: list[Tensor] = []
    count = 0
    if shared:
        copy_from_main(network.buffers())
    with eval_mode(network), torch.inference_mode(), autocast(device, precision):
        for batch in with_bar(batches, progress, total):
            logits = network(batch.images.to(device, non_blocking=True), want=("logits",)).logits
            if not hits:
                ks = default_top(logits.shape[1]) if ks is None else ks
                check_top(ks, logits.shape[1])
            assert ks is not None
            _check_labels(batch.labels, logits.shape[1])
            hits.append(_hits(logits, batch.labels.to(logits.device, non_blocking=True), ks))
            count += len(logits)
    found = (ks, count, torch.stack(hits).tolist() if hits else [])
    parts = gather_objects(found) if shared else [found]
    count = sum(part[1] for part in parts)
    if count == 0:
        raise UserError("there are no images to classify; check that the data set is not empty.")
    ks = next(part[0] for part in parts if part[1])
    assert ks is not None
    # Batch by batch in their order, so that the sums of the fractions do not depend on who counted.
    of_batches = zip(*(batch for part in parts for batch in part[2]), strict=True)
    return {f"top{k}": sum(hits) / count for k, hits in zip(ks, of_batches, strict=True)}


def _check_labels(labels: Tensor, num_classes: int) -> None:
    """An index beyond the logits would end the process on a GPU."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise UserError(
            f"the labels run from {int(labels.min())} to {int(labels.max())} and the network has {num_classes} classes; "
            "use the data set that it was trained on."
        )


def _hits(logits: Tensor, labels: Tensor, ks: Sequence[int]) -> Tensor:
    """(len(ks),) float64: the rows that count for each k, ties in part."""
    logits = logits.detach().float() if logits.dtype in (torch.float16, torch.bfloat16) else logits.detach()
    own = logits.gather(1, labels[:, None])
    above, equal = (logits > own).sum(1), (logits == own).sum(1)
    places = torch.tensor(list(ks), device=logits.device)[:, None]
    credit = ((places - above).double() / equal.clamp(min=1)).clamp(0, 1)
    return torch.where(logits.isnan().any(1), 0.0, credit).sum(1)
