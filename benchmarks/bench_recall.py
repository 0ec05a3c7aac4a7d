"""Exact neighbours and the metrics made of them: against the bare matrix product, the plain N x N formula, faiss, and
pytorch-metric-learning where it is installed.

    python benchmarks/bench_recall.py [--quick]

One thread, process CPU time, rounds interleaved; values are compared before anything is timed. The product is in the blocks
in which it is fastest here. Without --quick also, in three rounds, at the size of Stanford Online Products' test set, which
takes some minutes; there the plain formula would need 50 GiB.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import Row, Target, compared, interleaved, peak_in_a_process, show  # noqa: E402

from metric_kd.evaluation.embed import Embeddings  # noqa: E402
from metric_kd.evaluation.metrics import recall  # noqa: E402
from metric_kd.evaluation.retrieval import evaluate_retrieval  # noqa: E402
from metric_kd.evaluation.search import find_neighbours  # noqa: E402

WIDTH = 512
KS = (1, 2, 4, 8)
CARS, PRODUCTS = (8131, 98), (60_502, 11_316)
"""(images, classes) of the test sets of Cars196 and Stanford Online Products."""
METRICS = ["precision@1", "r_precision", "map@r"]
NOISE = 3.5
"""Spread about a centre: so much that not all neighbours are of the query's class, or equal values would say little."""
QUERIES, ROWS = 2048, 4096
"""The blocks of the bare product."""
RECALL = "Recall@1,2,4,8"
OF_PRODUCT = Target(time=1 / 1.4)
"""1.4 times the time of the product at most."""


def clustered(images: int, classes: int) -> tuple[Tensor, Tensor]:
    """Vectors of length 1 about a centre for each class, classes in random order; made in place."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=draw)
    centres = torch.randn(classes, WIDTH, generator=draw)
    x = torch.randn(images, WIDTH, generator=draw)
    for part, own in zip(x.split(1024), labels.split(1024), strict=True):
        part.mul_(NOISE).add_(centres[own])
        F.normalize(part, out=part)
    return x, labels


def product(x: Tensor) -> Callable[[], None]:
    """All inner products, block by block into one buffer, and nothing else."""
    out = torch.empty(QUERIES * ROWS)

    def run() -> None:
        for queries in x.split(QUERIES):
            for rows in x.split(ROWS):
                torch.mm(queries, rows.T, out=out[: len(queries) * len(rows)].view(len(queries), len(rows)))

    return run


def plain_recall(x: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """All distances at once, the query itself far from itself, the nearest max K, hits."""
    lengths = x.square().sum(1)
    distances = (lengths[:, None] + lengths[None] - 2 * (x @ x.T)).clamp(min=1e-12).sqrt()
    distances.fill_diagonal_(torch.inf)
    near = distances.topk(max(ks), largest=False).indices
    hits = labels[near] == labels[:, None]
    return {k: float(hits[:, :k].any(1).float().mean()) for k in ks}


def prepare(which: str, images: int, classes: int) -> Callable[[], Any]:
    """What :func:`peak_in_a_process` measures: after a small search, which loads the libraries."""
    x, labels = clustered(images, classes)
    work = {"ours": lambda x, y: recall(x, y, KS), "plain": plain_recall}[which]
    work(x[:300].clone(), labels[:300])
    return lambda: work(x, labels)


def recall_rows(rounds: int) -> list[Row]:
    x, labels = clustered(*CARS)
    ours, plain = recall(x, labels, KS), plain_recall(x, labels)
    assert all(abs(ours[k] - plain[k]) < 2 / len(x) for k in KS), (ours, plain)
    assert 0.05 < ours[1] < ours[8] < 1
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: recall(x, labels, KS),
        "torch": lambda: find_neighbours(x, k=max(KS), query_labels=labels, prefer="torch"),
        "product": product(x),
        "plain": lambda: plain_recall(x, labels),
    }
    try:
        import faiss
    except ImportError:
        pass
    else:
        faiss.omp_set_num_threads(1)
        functions["faiss"] = lambda: faiss.knn(x.numpy(), x.numpy(), max(KS) + 1)
    found = interleaved(functions, rounds)
    memory = [peak_in_a_process("bench_recall", "prepare", which, *CARS, times=1) for which in ("plain", "ours")]
    against = {
        "product": ("bare product", OF_PRODUCT),
        "faiss": ("search by faiss alone", Target()),
        "plain": ("all distances at once", Target(time=2, tuned=1.3, memory=10)),
    }
    size = f"{CARS[0]} x {WIDTH}"
    rows = [
        compared(RECALL, size, found, "ours", peer, target, against=name)
        for peer, (name, target) in against.items()
        if peer in found
    ]
    rows[-1] = rows[-1]._replace(memory_ratio=memory[0] / memory[1])
    return [
        *rows,
        compared(f"{RECALL}, without faiss", size, found, "torch", "product", Target(), against="bare product"),
    ]


def metric_rows(rounds: int) -> list[Row]:
    """P@1, R-precision and MAP@R, for which about 100 neighbours of every query are searched."""
    x, labels = clustered(*CARS)
    data = Embeddings(x, labels, torch.arange(len(x)))
    ours = evaluate_retrieval(data, [1], metrics=METRICS)[0]
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: evaluate_retrieval(data, [1], metrics=METRICS),
        "8 alone": lambda: find_neighbours(x, k=8, query_labels=labels),
    }
    try:
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    except ImportError:
        pass
    else:
        names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
        calculator = AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
        theirs = calculator.get_accuracy(x, labels)
        assert all(abs(ours[a] - theirs[b]) < 1e-6 for a, b in zip(METRICS, names, strict=True)), (ours, theirs)
        functions["theirs"] = lambda: calculator.get_accuracy(x, labels)
    found = interleaved(functions, rounds)
    name, size = "P@1, R-precision, MAP@R", f"{CARS[0]} x {WIDTH}"
    rows = [compared(name, size, found, "ours", "8 alone", OF_PRODUCT, against="search for 8 alone")]
    if "theirs" in found:
        rows.append(compared(name, size, found, "ours", "theirs", Target(time=1), against="pytorch-metric-learning"))
    return rows


def large_rows() -> list[Row]:
    """At 60,502 x 512: time against the product, and memory beyond the embeddings."""
    x, labels = clustered(*PRODUCTS)
    found = interleaved({"product": product(x), "ours": lambda: recall(x, labels, KS)}, rounds=3)
    memory = peak_in_a_process("bench_recall", "prepare", "ours", *PRODUCTS, times=1) / 2**20
    size = f"{PRODUCTS[0]} x {WIDTH}"
    target = Target(most=100)
    return [
        compared(RECALL, size, found, "ours", "product", OF_PRODUCT, against="bare product"),
        Row(f"{RECALL}, memory beyond the embeddings", size, memory, None, None, target=target, unit="MiB"),
    ]


def rows(quick: bool = False) -> list[Row]:
    """Every comparison, after the values are compared."""
    rounds = 3 if quick else 5
    return [*recall_rows(rounds), *metric_rows(rounds), *([] if quick else large_rows())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    show(rows("--quick" in sys.argv[1:]))
