"""Which losses let a student query its teacher's gallery: CIFAR-100, 50 training classes, 50 unseen ones.

    python benchmarks/compatibility.py --data DIR [--seeds 0 1 2] [--choose] [--out FILE.json]

DIR holds ``cifar100/{train,test}/<class>/*.png``. Teacher, start and training as in real_retrieval.py, but for the student's
embedding, which has the teacher's 128 numbers. Recall@1 on the unseen classes, measured once per network after its last
step; bridges are fitted on the training images. Every arm starts from the same weights and sees the same batches.

``--choose`` compares the candidates for preset ``compatible`` on the last fifth of the training classes instead.
"""

import argparse
import json
import statistics
from pathlib import Path

from real_retrieval import CLASSIFY, RKD_DA, SIZE, STEPS, Bench, Cifar100, Stage

from metric_kd.cli.parse import parse
from metric_kd.data import Geometry, ImageLoader, hold_out_classes
from metric_kd.deploy.bridge import fit_bridge
from metric_kd.evaluation.compatibility import PAIRS, compatibility
from metric_kd.evaluation.embed import Embeddings, embed
from metric_kd.models import Network

RATE = 1e-2
BRIDGES = (None, "ridge", "procrustes")
PRESET = tuple(parse("distill", ["--preset", "compatible"]).config.loss or ())
ARMS = {
    "RKD-DA": RKD_DA,
    "regression": ("regression:1",),
    "regression + RKD-DA": ("regression:1", *RKD_DA),
    "csd": ("csd:1,student_temperature=0.05,teacher_temperature=0.05",),
    "preset compatible": PRESET,
}


def _csd(weight: float, temperature: float) -> str:
    return f"csd:{weight:g},student_temperature={temperature:g},teacher_temperature={temperature:g}"


CANDIDATES = {
    "RKD-DA": RKD_DA,
    "regression 5 + RKD-DA": ("regression:5", *RKD_DA),
    **{f"csd at {t:g}": (_csd(1, t),) for t in (0.1, 0.05)},
    **{f"csd at {t:g} + RKD-DA": (_csd(1, t), *RKD_DA) for t in (0.1, 0.05, 0.025)},
    "3 csd at 0.1 + RKD-DA": (_csd(3, 0.1), *RKD_DA),
    "csd at 0.1 + regression + RKD-DA": (_csd(1, 0.1), "regression:1", *RKD_DA),
}


class Trial:
    """One seed: the teacher, the start, and what both give."""

    def __init__(self, bench: Bench, seed: int):
        self.bench, self.seed = bench, seed
        self.teacher = Cifar100.teacher(bench, seed, Cifar100.rates["teacher"])
        self.start = bench.network("resnet8:stem_stride=2", self.teacher.spec.embedding_size, False, seed + 1000)
        bench.fit(self.start, Stage(CLASSIFY, 400, 1e-2, per_class=2), seed)
        plain = ImageLoader(bench.train.records, Geometry(input_size=SIZE, flip=False))
        self.loaders = {"train": plain, "test": bench.test}
        self.theirs = self.embedded(self.teacher)

    def embedded(self, network: Network) -> dict[str, Embeddings]:
        return {name: embed(network, loader.test(250)) for name, loader in self.loaders.items()}

    def student(self, losses: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """bridge -> {pair: Recall@1 in percent}."""
        network = self.bench.network("resnet8:stem_stride=2", self.start.spec.embedding_size, False, 0)
        network.load_state_dict(self.start.state_dict())
        self.bench.fit(network, Stage(losses, STEPS, RATE), self.seed, self.teacher)
        ours, found = self.embedded(network), {}
        for kind in BRIDGES:
            bridge = None if kind is None else fit_bridge(ours["train"].vectors, self.theirs["train"].vectors, kind)
            matrix = compatibility(ours["test"], self.theirs["test"], [1], bridge=bridge, unit=True, metrics=[])
            found[kind or "no bridge"] = {pair: 100 * matrix[pair]["recall@1"] for pair in PAIRS}
        return found


def row(name: str, results: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds, a line of the README's table."""

    def figure(bridge: str, pair: str) -> str:
        values = [result[bridge][pair] for result in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    across = [figure(bridge, "student-teacher") for bridge in ("no bridge", "procrustes", "ridge")]
    cells = [figure("no bridge", "student-student"), *across, figure("no bridge", "teacher-student")]
    return " | ".join(["", name, *cells, ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    splits = Cifar100.load(options.data)
    arms = CANDIDATES if options.choose else ARMS
    if options.choose:
        splits, options.seeds = hold_out_classes(splits.train), options.seeds[:1]
    bench = Bench(splits)
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in arms}
    for seed in options.seeds:
        trial = Trial(bench, seed)
        for name, losses in arms.items():
            found[name].append(trial.student(losses))
            print(f"seed {seed} {name}: {found[name][-1]}", flush=True)
    print("\n| losses | student-student | student-teacher | through a rotation | through a ridge | teacher-student |")
    print("|---|---|---|---|---|---|")
    for name, results in found.items():
        print(row(name, results))
    best = [result["no bridge"]["teacher-teacher"] for result in next(iter(found.values()))]
    print(f"teacher-teacher: {statistics.mean(best):.1f}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
