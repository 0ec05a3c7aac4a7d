"""Losses and samplers over the pairs of a batch: ours against the formulas as they are written, and against
pytorch-metric-learning where it is installed.

    python benchmarks/bench_pairs.py [--quick]

One thread, process CPU time, rounds interleaved. Values and gradients are compared in float64 before anything is timed.
"""

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import Row, interleaved, peak_in_a_process, ratio  # noqa: E402

from metric_kd.data.batches import ClassBalancedBatches  # noqa: E402
from metric_kd.functional import dark_rank, rkd_distance  # noqa: E402
from metric_kd.losses.samplers import AllPairs, DistanceWeighted  # noqa: E402
from metric_kd.losses.triplet import l2_triplet_all  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
IMAGES, CLASSES = 59_551, 11_318
"""The training half of Stanford Online Products."""


def plain_distances(x: Tensor) -> Tensor:
    lengths = x.square().sum(1)
    squared = lengths.unsqueeze(0) + lengths.unsqueeze(1) - 2 * (x @ x.t())
    distances = squared.clamp(min=1e-12).sqrt().clone()
    distances[range(len(x)), range(len(x))] = 0
    return distances


def plain_rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = plain_distances(teacher)
        target = target / target[target > 0].mean()
    ours = plain_distances(student)
    return F.smooth_l1_loss(ours / ours[ours > 0].mean(), target)


def plain_dark_rank(student: Tensor, teacher: Tensor, alpha: float = 2.0, beta: float = 3.0) -> Tensor:
    """The four nearest neighbours in the teacher, by sorting everything, and Plackett-Luce over them."""
    theirs, ours = (-alpha * plain_distances(x).pow(beta) for x in (teacher, student))
    nearest = theirs.sort(dim=1, descending=True).indices[:, 1:5]
    scores = ours.gather(1, nearest)
    rest = torch.stack([scores[:, place:].logsumexp(1) for place in range(4)], 1)
    return -(scores - rest).sum(1).mean()


def plain_triplets(labels: Tensor) -> Triplets:
    """Every positive pair with every negative of its anchor, one pair after the other."""
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    pairs = (same & ~torch.eye(len(labels), dtype=torch.bool)).nonzero()
    anchors, positives, negatives = [], [], []
    for anchor, positive in pairs:
        negative = (~same[anchor]).nonzero().squeeze(1)
        anchors.append(anchor.repeat(len(negative)))
        positives.append(positive.repeat(len(negative)))
        negatives.append(negative)
    return torch.cat(anchors), torch.cat(positives), torch.cat(negatives)


def plain_l2_triplet(x: Tensor, labels: Tensor) -> Tensor:
    anchor, positive, negative = plain_triplets(labels)
    return F.triplet_margin_loss(x[anchor], x[positive], x[negative], margin=0.2)


def plain_distance_weighted(x: Tensor, labels: Tensor) -> Triplets:
    """The rule as it is written, with the maximum of the whole row, and one draw for each positive pair."""
    with torch.no_grad():
        x = F.normalize(x, dim=1)
        n, width = x.shape
        distances = (plain_distances(x).square() + torch.eye(n)).sqrt().clamp(min=0.5)
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        log_weights = (2 - width) * distances.log() - (width - 3) / 2 * (1 - distances.square() / 4).log()
        weights = (log_weights - log_weights.max(1, keepdim=True).values).exp()
        weights = weights * ~same * (distances < 1.4)
        empty = weights.sum(1, keepdim=True) <= 0
        weights = weights + empty * ~same
        weights = weights / weights.sum(1, keepdim=True)
        anchor, positive = (same & ~torch.eye(n, dtype=torch.bool)).nonzero().unbind(1)
        return anchor, positive, weights[anchor].multinomial(1).squeeze(1)


def plain_batches(members: Mapping[int, list[int]], batch: int, per_class: int, iterations: int) -> list[list[int]]:
    """For every batch all classes in random order, and images of each until the batch is full."""
    batches = []
    for _ in range(iterations):
        images: list[int] = []
        for label in random.sample(list(members), len(members)):
            images += random.sample(members[label], min(per_class, len(members[label])))
            if len(images) >= batch:
                break
        batches.append(images[:batch])
    return batches


def numpy_batches(labels: np.ndarray, batch: int, per_class: int, iterations: int) -> list[np.ndarray]:
    """As :func:`plain_batches`, with numpy's permutation and one look through all labels for every class."""
    classes, batches = np.unique(labels), []
    for _ in range(iterations):
        images: list[np.ndarray] = []
        for label in np.random.choice(classes, len(classes), replace=False):
            found = np.where(labels == label)[0]
            images.append(np.random.choice(found, min(per_class, len(found)), replace=False))
            if sum(map(len, images)) >= batch:
                break
        batches.append(np.concatenate(images)[:batch])
    return batches


def embeddings(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes_of(n: int, per_class: int) -> Tensor:
    return torch.arange(n) // per_class


def labels_of_products() -> np.ndarray:
    """Labels with that many images and classes: at least two images each, the others anywhere."""
    more = np.random.default_rng(0).integers(0, CLASSES, IMAGES - 2 * CLASSES)
    return np.sort(np.concatenate([np.repeat(np.arange(CLASSES), 2), more]))


def step(loss: Loss, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(value, gradient) of one forward and backward."""
    x = x.detach().requires_grad_()
    value = loss(x, other)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "rkd_distance": (rkd_distance, plain_rkd_distance),
    "dark_rank": (dark_rank, plain_dark_rank),
    "l2_triplet of all": (l2_triplet_all, plain_l2_triplet),
}


def inputs(name: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    if name == "l2_triplet of all":
        return embeddings(n, d, dtype), classes_of(n, 5)
    return embeddings(n, d, dtype), embeddings(n, d, dtype, seed=1)


def prepared(name: str, whose: str, n: int, d: int) -> Callable[[], Any]:
    """One step of a loss, ours or the peer's, for the memory it takes."""
    loss = LOSSES[name][("ours", "peer").index(whose)]
    step(loss, *inputs(name, 12, 4))
    x, other = inputs(name, n, d)
    return lambda: step(loss, x, other)


def assert_parity() -> None:
    for name, losses in LOSSES.items():
        for n, d in ((7, 3), (40, 16)):
            ours, theirs = (step(loss, *inputs(name, n, d, torch.float64)) for loss in losses)
            for own, expected in zip(ours, theirs, strict=True):
                assert (own - expected).abs().max() <= 1e-9 * expected.abs().max(), (name, n)
    labels = classes_of(33, 4)
    for own, expected in zip(AllPairs()(embeddings(33, 2), labels), plain_triplets(labels), strict=True):
        assert torch.equal(own, expected)


def row(name: str, size: str, found: Mapping[str, list[float]], peer: str, target: str) -> Row:
    ours, theirs = (1e3 * statistics.median(found[whose]) if whose in found else None for whose in ("ours", peer))
    assert ours is not None
    ahead = ratio(found, "ours", peer) if peer in found else None
    return Row(f"{name}, {peer}", size, ours, theirs, ahead, None, target)


def loss_row(name: str, n: int, d: int, target: str, rounds: int) -> Row:
    ours, theirs = LOSSES[name]
    x, other = inputs(name, n, d)
    times = interleaved({"ours": lambda: step(ours, x, other), "formula": lambda: step(theirs, x, other)}, rounds)
    peaks = [peak_in_a_process("bench_pairs", "prepared", name, whose, n, d) for whose in ("ours", "peer")]
    return row(name, f"N={n} D={d}", times, "formula", target)._replace(memory_ratio=peaks[1] / max(peaks[0], 4096))


def samplers(rounds: int) -> list[Row]:
    x, labels = embeddings(128, 128), classes_of(128, 5)
    y, of_eight = F.normalize(embeddings(256, 128)), classes_of(256, 8)
    indices = {"ours": lambda: AllPairs()(x, labels), "formula": lambda: plain_triplets(labels)}
    draws = {"ours": lambda: DistanceWeighted()(y, of_eight), "formula": lambda: plain_distance_weighted(y, of_eight)}
    if pml := pytorch_metric_learning():
        miner = pml["miner"]()
        indices["pytorch-metric-learning"] = lambda: pml["triplets"](labels)
        draws["pytorch-metric-learning"] = lambda: miner(y, of_eight)
    times, drawn = interleaved(indices, rounds), interleaved(draws, rounds)
    return [
        row("all triplets", "N=128, 5 a class", times, "formula", "12 by time"),
        row("all triplets", "N=128, 5 a class", times, "pytorch-metric-learning", "3 by time"),
        row("distance-weighted triplets", "N=256 D=128, 8 a class", drawn, "formula", "5 by time"),
        row("distance-weighted triplets", "N=256 D=128, 8 a class", drawn, "pytorch-metric-learning", "10 by time"),
    ]


def batches(rounds: int) -> list[Row]:
    """100 batches; pytorch-metric-learning wants whole classes, so there 60 images instead of 64."""
    labels = labels_of_products()
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    ours, of_sixty = (ClassBalancedBatches(labels, batch, 5, 100, seed=0) for batch in (64, 60))
    times = interleaved(
        {
            "ours": lambda: ours.epoch(0),
            "formula": lambda: plain_batches(members, 64, 5, 100),
            "formula in numpy": lambda: numpy_batches(labels, 64, 5, 100),
        },
        rounds,
    )
    whole: dict[str, Callable[[], Any]] = {"ours": lambda: of_sixty.epoch(0)}
    if pml := pytorch_metric_learning():
        sampler = pml["batches"](labels, 5, 60, 6000)
        whole["pytorch-metric-learning"] = lambda: list(sampler)
    size = f"100 of 64, {CLASSES} classes"
    return [
        row("class-balanced batches", size, times, "formula", "80 by time"),
        row("class-balanced batches", size, times, "formula in numpy", ""),
        row(
            "class-balanced batches",
            size.replace("64", "60"),
            interleaved(whole, rounds),
            "pytorch-metric-learning",
            "8 by time",
        ),
    ]


def pytorch_metric_learning() -> dict[str, Any] | None:
    try:
        from pytorch_metric_learning.miners import DistanceWeightedMiner
        from pytorch_metric_learning.samplers import MPerClassSampler
        from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices
    except ImportError:
        return None
    return {"miner": DistanceWeightedMiner, "batches": MPerClassSampler, "triplets": get_all_triplets_indices}


def rows(quick: bool = False) -> list[Row]:
    """Every comparison, after parity is asserted."""
    assert_parity()
    rounds = 2 if quick else 5
    losses = [
        loss_row("rkd_distance", 1024, 512, "3 by time", rounds),
        loss_row("dark_rank", 1024, 512, "2.5 by time", rounds),
        loss_row("l2_triplet of all", 128, 128, "60 by time, 40 by memory", rounds),
    ]
    return losses + samplers(rounds) + batches(rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in rows("--quick" in sys.argv[1:]):
        print(line)
