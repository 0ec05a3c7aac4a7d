"""Losses and samplers over the pairs of a batch: ours against the formulas as they are written, and against
pytorch-metric-learning where it is installed.

    python benchmarks/bench_pairs.py [--quick]

One thread, process CPU time, rounds interleaved. Values and gradients are compared in float64 before anything is timed.
"""

import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import Row, Target, compared, interleaved, peak_in_a_process, show  # noqa: E402

from metric_kd.data.batches import ClassBalancedBatches  # noqa: E402
from metric_kd.functional import dark_rank, rkd_distance  # noqa: E402
from metric_kd.losses.samplers import AllPairs, DistanceWeighted  # noqa: E402
from metric_kd.losses.triplet import l2_triplet_all  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
Triplets = tuple[Tensor, Tensor, Tensor]
IMAGES, CLASSES = 59_551, 11_318
"""The training half of Stanford Online Products."""
PML = "pytorch-metric-learning"
TRIPLETS = "all-triplet margin loss"


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
    pairs = (same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)).nonzero()
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


def plain_weights(x: Tensor, same: Tensor) -> Tensor:
    """The rule as it is written, with the maximum of the whole row."""
    x = F.normalize(x, dim=1)
    n, width = x.shape
    distances = (plain_distances(x).square() + torch.eye(n)).sqrt().clamp(min=0.5)
    log_weights = (2 - width) * distances.log() - (width - 3) / 2 * (1 - distances.square() / 4).log()
    weights = (log_weights - log_weights.max(1, keepdim=True).values).exp()
    weights = weights * ~same * (distances < 1.4)
    empty = weights.sum(1, keepdim=True) <= 0
    weights = weights + empty * ~same
    return weights / weights.sum(1, keepdim=True)


def plain_distance_weighted(x: Tensor, labels: Tensor) -> Triplets:
    """One draw for each positive pair."""
    with torch.no_grad():
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        weights = plain_weights(x, same)
        anchor, positive = (same & ~torch.eye(len(x), dtype=torch.bool)).nonzero().unbind(1)
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
    "RKD distance": (rkd_distance, plain_rkd_distance),
    "DarkRank": (dark_rank, plain_dark_rank),
    TRIPLETS: (l2_triplet_all, plain_l2_triplet),
}


def inputs(name: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    if name == TRIPLETS:
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
    assert_parity_of_draws()


def assert_parity_of_draws() -> None:
    """Draws themselves differ; what they are drawn from, and what a batch is made of, does not."""
    x, labels = embeddings(64, 16, torch.float64), classes_of(64, 4)
    expected = plain_weights(x, labels[:, None] == labels)
    assert (DistanceWeighted().weights(x, labels) - expected).abs().max() <= 1e-9
    ours, theirs = DistanceWeighted()(x, labels), plain_distance_weighted(x, labels)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert bool((expected[ours[0], ours[2]] > 0).all())
    numbers = np.repeat(np.arange(30), 9)
    members = {label: np.flatnonzero(numbers == label).tolist() for label in range(30)}
    drawn = [*plain_batches(members, 64, 5, 3), *ClassBalancedBatches(numbers, 64, 5, 3, seed=0).epoch(0)]
    for batch in drawn:
        counts = np.bincount(numbers[batch])
        assert len(set(batch)) == 64 and sorted(counts[counts > 0]) == [4] + [5] * 12


def loss_row(name: str, n: int, d: int, target: Target, rounds: int) -> Row:
    ours, theirs = LOSSES[name]
    x, other = inputs(name, n, d)
    times = interleaved({"ours": lambda: step(ours, x, other), "formula": lambda: step(theirs, x, other)}, rounds)
    peaks = [peak_in_a_process("bench_pairs", "prepared", name, whose, n, d) for whose in ("ours", "peer")]
    return compared(name, f"N={n} D={d}", times, "ours", "formula", target, memory_ratio=peaks[1] / peaks[0])


def sampler_rows(rounds: int) -> list[Row]:
    x, labels = embeddings(128, 128), classes_of(128, 5)
    y, of_eight = F.normalize(embeddings(256, 128)), classes_of(256, 8)
    indices = {"ours": lambda: AllPairs()(x, labels), "formula": lambda: plain_triplets(labels)}
    draws = {"ours": lambda: DistanceWeighted()(y, of_eight), "formula": lambda: plain_distance_weighted(y, of_eight)}
    if pml := pytorch_metric_learning():
        miner = pml["miner"]()
        indices[PML] = lambda: pml["triplets"](labels)
        draws[PML] = lambda: miner(y, of_eight)
    work = [
        ("all triplets", "N=128, 5 a class", interleaved(indices, rounds), {"formula": 12, PML: 3}),
        ("distance-weighted triplets", "N=256 D=128, 8 a class", interleaved(draws, rounds), {"formula": 5, PML: 10}),
    ]
    return [
        compared(name, size, times, "ours", peer, Target(time=target))
        for name, size, times, targets in work
        for peer, target in targets.items()
        if peer in times
    ]


def batch_rows(rounds: int) -> list[Row]:
    """100 batches; pytorch-metric-learning wants whole classes, so there 60 images instead of 64."""
    labels = labels_of_products()
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    ours, of_sixty = (ClassBalancedBatches(labels, batch, 5, 100, seed=0) for batch in (64, 60))
    name, size = "class-balanced batches", f"100 of {{}}, {IMAGES} images, {CLASSES} classes"
    plain = {"ours": lambda: ours.epoch(0), "formula": lambda: plain_batches(members, 64, 5, 100)}
    found = [compared(name, size.format(64), interleaved(plain, rounds), "ours", "formula", Target(time=80))]
    if pml := pytorch_metric_learning():
        sampler = pml["batches"](labels, 5, 60, 6000)
        whole: dict[str, Callable[[], Any]] = {"ours": lambda: of_sixty.epoch(0), PML: lambda: list(sampler)}
        found.append(compared(name, size.format(60), interleaved(whole, rounds), "ours", PML, Target(time=8)))
    return found


def pytorch_metric_learning() -> dict[str, Any] | None:
    """What is compared with, where it is installed."""
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
        loss_row("RKD distance", 1024, 512, Target(time=3), rounds),
        loss_row("DarkRank", 1024, 512, Target(time=2.5), rounds),
        loss_row(TRIPLETS, 128, 128, Target(time=60, memory=40), rounds),
    ]
    return losses + sampler_rows(rounds) + batch_rows(rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(rows("--quick" in sys.argv[1:]))
