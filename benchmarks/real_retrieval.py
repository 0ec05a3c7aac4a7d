"""What distillation gives on real images of unseen classes: Omniglot (characters) and CIFAR-100 (objects).

    python benchmarks/real_retrieval.py --data DIR [--only omniglot|cifar100] [--choose] [--out FILE.json]

DIR holds ``omniglot_small/<alphabet>/<character>/*.png`` and ``cifar100/{train,test}/<class>/*.png``. Classes of training
and test are disjoint; Recall@1 on the test classes, every image a query against all others, is measured once per network,
after its last step. Every arm of a comparison starts from the same weights and sees the same batches. The control at equal
compute gives the student without a teacher as many more steps as the teacher's forward passes and the relational losses
cost, in processor time measured in the same run.

``--choose`` picks the learning rates instead of using those below: it trains on the first four fifths of the training
classes and compares on the last fifth.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tqdm import tqdm

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.data import ClassBalancedBatches, Geometry, ImageLoader, Splits, hold_out_classes, load_dataset
from metric_kd.engine.optimisation import Settings, learning_rate, make_optimizer
from metric_kd.engine.tasks import Solo
from metric_kd.evaluation.embed import embed
from metric_kd.evaluation.retrieval import evaluate_retrieval
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models import Network, NetworkSpec, Pixels, build_network

STEPS = 400
BATCH = 100
SIZE = 32


@dataclass(frozen=True)
class Stage:
    """So many steps of some losses at some rate (Adam, cosine), on batches of 100 images."""

    losses: tuple[str, ...]
    steps: int
    lr: float
    per_class: int = 5


class Bench:
    """One split, in memory, and the hand-written loop that trains on it."""

    def __init__(self, splits: Splits):
        self.train = ImageLoader(splits.train, Geometry(input_size=SIZE), progress=True)
        self.test = ImageLoader(splits.test, Geometry(input_size=SIZE, flip=False), progress=True)

    def network(self, base: str, embedding_size: int, l2normalize: bool, seed: int) -> Network:
        torch.manual_seed(seed)
        records = self.train.records
        pixels = Pixels(records.mean, records.std) if records.mean and records.std else Pixels()
        return build_network(NetworkSpec(base, embedding_size, l2normalize, SIZE, pixels))

    def fit(self, network: Network, stage: Stage, seed: int, teacher: Network | None = None) -> float:
        """Train in place; returns processor seconds per step."""
        task = Solo(network, teacher, Objective([parse_loss(loss) for loss in stage.losses]))
        torch.manual_seed(seed)
        task.build(self.train.example(2), self.train.records.num_classes)
        settings = Settings(epochs=1, iterations=stage.steps, lr=stage.lr, schedule="cosine")
        optimizer = make_optimizer(settings, task.parameters())
        labels = self.train.records.labels
        order = ClassBalancedBatches(labels, BATCH, stage.per_class, stage.steps, seed).epoch(1)
        task.train()
        started = time.process_time()
        for step in tqdm(range(stage.steps), desc=" + ".join(stage.losses), leave=False, mininterval=1):
            batch = next(iter(self.train.train(order[step : step + 1], epoch=step)))
            optimizer.param_groups[0]["lr"] = learning_rate(settings, 1, step)
            loss, _ = task(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.process_time() - started) / stage.steps

    def recall(self, network: Network) -> float:
        vectors = embed(network, self.test.test(250))
        return 100 * evaluate_retrieval(vectors, [1])[0]["recall@1"]


def copy_of(network: Network, l2normalize: bool) -> Network:
    """The same weights, with or without normalised embeddings."""
    twin = build_network(replace(network.spec, l2normalize=l2normalize))
    twin.load_state_dict(network.state_dict())
    return twin


TRIPLET = ("l2_triplet:1,sample=distance",)
CLASSIFY = ("cross_entropy:1,features=pooled",)
RKD_DA = ("rkd_distance:1", "rkd_angle:2")


class Omniglot:
    """Triplet teacher; the student learns triplet + RKD-DA from scratch, all embeddings normalised."""

    seeds = range(5)
    normalised = True
    rates = {"teacher": 3e-3, "triplet": 3e-2, "distilled": 3e-2}
    grid = {"teacher": (1e-3, 3e-3, 1e-2), "triplet": (3e-3, 1e-2, 3e-2), "distilled": (3e-3, 1e-2, 3e-2)}
    losses = {"triplet": TRIPLET, "distilled": (*TRIPLET, *RKD_DA)}

    @staticmethod
    def load(data: Path) -> Splits:
        return load_dataset("omniglot", str(data / "omniglot_small"), train_classes=157)

    @staticmethod
    def teacher(bench: Bench, seed: int, rate: float) -> Network:
        network = bench.network("resnet8_x2:stem_stride=2", 128, True, seed)
        bench.fit(network, Stage(TRIPLET, 300, rate), seed)
        return network

    @staticmethod
    def start(bench: Bench, seed: int) -> Network:
        return bench.network("resnet8_x0.5:stem_stride=2", 16, True, seed + 1000)


class Cifar100:
    """Teacher and student both start as classifiers; then triplet, or RKD-DA alone on embeddings of any length."""

    seeds = range(3)
    normalised = False
    rates = {"teacher": 3e-4, "triplet": 1e-3, "distilled": 1e-2}
    grid = {"teacher": (3e-4, 1e-3, 3e-3), "triplet": (1e-4, 3e-4, 1e-3, 3e-3), "distilled": (1e-3, 3e-3, 1e-2)}
    losses = {"triplet": TRIPLET, "distilled": RKD_DA}

    @staticmethod
    def load(data: Path) -> Splits:
        return load_dataset("cifar100", str(data / "cifar100"))

    @staticmethod
    def teacher(bench: Bench, seed: int, rate: float) -> Network:
        network = bench.network("resnet8_x2:stem_stride=2", 128, True, seed)
        bench.fit(network, Stage(CLASSIFY, 1700, 1e-2, per_class=2), seed)
        bench.fit(network, Stage(TRIPLET, 250, rate), seed)
        return network

    @staticmethod
    def start(bench: Bench, seed: int) -> Network:
        network = bench.network("resnet8:stem_stride=2", 64, True, seed + 1000)
        bench.fit(network, Stage(CLASSIFY, 400, 1e-2, per_class=2), seed)
        return network


PARTS = {"omniglot": Omniglot, "cifar100": Cifar100}


def student(part: Any, bench: Bench, arm: str, start: Network, teacher: Network, stage: Stage, seed: int) -> Any:
    """(Recall@1, processor seconds per step) of one arm."""
    distilled = arm == "distilled"
    network = copy_of(start, part.normalised or not distilled)
    seconds = bench.fit(network, stage, seed, teacher if distilled else None)
    return bench.recall(network), seconds


def run(part: Any, bench: Bench, seed: int) -> dict[str, float]:
    """Recall@1 of the teacher, the student alone, the distilled one, and the control at equal compute."""
    teacher = part.teacher(bench, seed, part.rates["teacher"])
    start = part.start(bench, seed)
    result = {"teacher": bench.recall(teacher)}
    cost = {}
    for arm, losses in part.losses.items():
        stage = Stage(losses, STEPS, part.rates[arm])
        result[arm], cost[arm] = student(part, bench, arm, start, teacher, stage, seed)
    longer = Stage(TRIPLET, round(STEPS * cost["distilled"] / cost["triplet"]), part.rates["triplet"])
    result["equal compute"], _ = student(part, bench, "triplet", start, teacher, longer, seed)
    result["its steps"] = longer.steps
    return result


def choose(name: str, part: Any, splits: Splits) -> None:
    """Print Recall@1 on the last fifth of the training classes for every learning rate, seed 0."""
    bench = Bench(hold_out_classes(splits.train))
    teachers = {rate: part.teacher(bench, 0, rate) for rate in part.grid["teacher"]}
    recalls = {rate: bench.recall(network) for rate, network in teachers.items()}
    best = max(recalls, key=lambda rate: recalls[rate])
    print(f"{name} teacher, held-out training classes: {recalls}, chosen {best}", flush=True)
    start = part.start(bench, 0)
    for arm, losses in part.losses.items():
        recalls = {
            rate: student(part, bench, arm, start, teachers[best], Stage(losses, STEPS, rate), 0)[0]
            for rate in part.grid[arm]
        }
        print(f"{name} {arm}: {recalls}, chosen {max(recalls, key=lambda rate: recalls[rate])}", flush=True)


def summary(name: str, results: Sequence[dict[str, float]]) -> str:
    lines = [f"{name}: Recall@1 on unseen classes, mean +- standard deviation over {len(results)} seeds"]
    for key in results[0]:
        values = [result[key] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(f"  {key:14} {statistics.mean(values):7.2f} +- {spread:.2f}")
    for other in ("triplet", "equal compute"):
        gains = [result["distilled"] - result[other] for result in results]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        lines.append(f"  distilled - {other:13} {statistics.mean(gains):+6.2f} +- {spread:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    everything = {}
    for name, part in PARTS.items():
        if options.only not in (None, name):
            continue
        splits = part.load(options.data)
        if options.choose:
            choose(name, part, splits)
            continue
        bench = Bench(splits)
        results = []
        for seed in options.seeds or part.seeds:
            results.append(run(part, bench, seed))
            print(f"{name} seed {seed}: " + ", ".join(f"{k} {v:.1f}" for k, v in results[-1].items()), flush=True)
        print(summary(name, results), flush=True)
        everything[name] = results
    if options.out is not None:
        options.out.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
