"""Every distillation method on real CIFAR-100, in a budget for two cores: accuracy, time per step, memory.

    python benchmarks/cifar_methods.py --data DIR [--methods st at ...] [--seeds 3] [--steps 500] [--out FILE.json]
    python benchmarks/cifar_methods.py --data DIR --choose [--methods ...]
    python benchmarks/cifar_methods.py --data DIR --cost [--methods ...]

DIR holds CIFAR-100 (pickles, or ``train/<class>/*.png`` and ``test/<class>/*.png``); the first 50 classes are used, or
``--classes``. A resnet20 teacher is trained once (``--teacher FILE`` keeps it); the student is a resnet8 of half the
width, both with a strided stem, which halves the sides of all maps. Every arm of a seed starts from the same weights and
sees the same batches in its main stage; methods with a stage of their own take more steps, which the table shows. Three
arms without a teacher stand beside the methods: cross entropy for the same number of steps, and for twice and three times
as many, controls whose processor time stands beside that of each method. The Zoo's weights are tuned for 200 epochs of another
pair; those used here were chosen among a tenth, once and ten times the Zoo's by ``--choose``: one seed, measured on a tenth
of the training images that is held out. The table says that each method trains and what it gave in this budget, not
which is best.

``--cost`` times one training step of each method (of ab and fsp in their own stage) against one of ``st`` in
alternation, in one process per method, and gives the memory that a step takes at most beyond what lies there before it.
The student is fresh, so that bss finds few images to attack; an attack of 32 images costs ten teacher steps more.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import metric_kd.distill  # noqa: F401 (registers the methods)
from metric_kd.data import Geometry, ImageLoader, load_dataset
from metric_kd.data.batches import ShuffledBatches
from metric_kd.data.records import hold_out_images
from metric_kd.engine.checkpoint import restore_network, write_checkpoint
from metric_kd.engine.memory import peak_memory, reset_peak_memory
from metric_kd.engine.mutual import Mutual
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.tasks import Solo
from metric_kd.engine.trainer import Trainer
from metric_kd.errors import UserError
from metric_kd.evaluation.classification import evaluate_classification
from metric_kd.losses.objective import Objective, parse_loss
from metric_kd.models import Network, NetworkSpec, Pixels, build_network

STUDENT, TEACHER, TEACHER_STEPS = "resnet8_x0.5:stem_stride=2", "resnet20:stem_stride=2", 4000
BATCH, EPOCHS = 64, 20
CPU = torch.device("cpu")
METHODS = {
    "logits": ("logits:{weight}", 0.1, 10),
    "st": ("st:{weight},temperature=4", 0.1, 10),
    "at": ("at:{weight}", 1000, 0.1),
    "fitnet": ("fitnet:{weight},layers=3,embedding=false,connector=regressor", 0.1, 10),
    "nst": ("nst:{weight}", 10, 0.1),
    "pkt": ("pkt:{weight}", 10000, 1),
    "fsp": ("fsp:{weight}", 1, 0.1),
    "ft": ("ft:{weight}", 200, 1),
    "rkd": ("rkd:{weight}", 1, 0.1),
    "ab": ("ab:{weight}", 10, 10),
    "sp": ("sp:{weight}", 3000, 1),
    "sobolev": ("sobolev:{weight}", 20, 1),
    "bss": ("bss:{weight}", 2, 0.1),
    "cc": ("cc:{weight}", 100, 1),
    "lwm": ("lwm:{weight}", 0.4, 1),
    "irg": ("irg:{weight}", 1, 0.1),
    "vid": ("vid:{weight}", 1, 10),
    "ofd": ("ofd:{weight}", 0.5, 10),
    "afd": ("afd:{weight}", 500, 1),
    "crd": ("crd:{weight}", 0.8, 0.1),
    "kdsvd": ("kdsvd:{weight}", 1, 0.1),
    "dark_rank": ("dark_rank:{weight}", 0.01, 0.1),
    "dml": ("dml:{weight}", 1, 0.1),
}
"""The loss beside cross entropy; the Zoo's weight; the factor that was chosen.

kdsvd and dark_rank have no weight there; dark_rank cubes the distances of features that are not normalised here, and
diverges at 0.1 and above.
"""

FACTORS = (0.1, 1, 10)


def loss_of(method: str, factor: float | None = None) -> str:
    """A method's loss at its chosen weight, or at another factor of the Zoo's."""
    spelling, weight, chosen = METHODS[method]
    return spelling.format(weight=f"{weight * (chosen if factor is None else factor):g}")


CROSS_ENTROPY = "cross_entropy:1,features=logits"


class Bench:
    """The images, in memory, and what is trained on them."""

    def __init__(self, data: str, classes: int, steps: int, scratch: Path, held_out: bool = False):
        splits = load_dataset("cifar100", data, task="classification", train_classes=classes)
        if held_out:
            splits = hold_out_images(splits.train)
        self.train = ImageLoader(splits.train, Geometry(input_size=32))
        self.test = ImageLoader(splits.test, Geometry(input_size=32, flip=False))
        self.steps, self.scratch = steps, scratch

    def network(self, base: str, seed: int) -> Network:
        torch.manual_seed(seed)
        records = self.train.records
        pixels = Pixels(records.mean, records.std) if records.mean and records.std else Pixels()
        return build_network(NetworkSpec(base, 0, False, 32, pixels, num_classes=records.num_classes))

    def task(self, losses: list[str], seed: int, teacher: Network | None) -> Solo | Mutual:
        """A student from its seed, its objective and what teaches it, built on real images."""
        student = self.network(STUDENT, seed)
        specs = [parse_loss(loss) for loss in losses]
        torch.manual_seed(seed + 1000)
        task: Solo | Mutual
        if any(spec.name == "dml" for spec in specs):
            task = Mutual({"student": student, "peer1": self.network(STUDENT, seed + 500)}, specs)
        else:
            task = Solo(student, teacher, Objective(specs))
        records = self.train.records
        task.build(self.train.example(2), records.num_classes, torch.from_numpy(records.labels))
        return task

    def trainer(self, task: Solo | Mutual, seed: int, steps: int, folder: Path) -> Trainer:
        """The Zoo's recipe, shortened: SGD at 0.1, a tenth after half and after three quarters."""
        settings = Settings(
            epochs=EPOCHS,
            iterations=steps // EPOCHS,
            lr=0.1,
            optimizer="sgd",
            weight_decay=1e-4,
            lr_decay_epochs=(EPOCHS // 2 + 1, 3 * EPOCHS // 4 + 1),
            seed=seed,
            save_minutes=1e9,
        )
        batches = ShuffledBatches(len(self.train.records), BATCH, seed, iterations=steps // EPOCHS)
        folder.mkdir(parents=True)
        return Trainer(task, settings, RunDirectory(folder), self.train, batches, CPU)

    def run(self, losses: list[str], seed: int, teacher: Network | None, steps: int) -> dict[str, float]:
        """Accuracy of the student after its last step, steps over all stages, processor seconds."""
        task = self.task(losses, seed, teacher)
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            trainer = self.trainer(task, seed, steps, Path(folder) / "run")
            started = time.process_time()
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # a line per epoch is too much here
                trainer.fit()
            seconds = time.process_time() - started
        return {**self.accuracy(task.student), "steps": trainer.step, "seconds": seconds}

    def trial(self, losses: list[str], teacher: Network) -> float:
        """Accuracy with the first seed; not a number where the run diverges."""
        try:
            return self.run(losses, 0, teacher, self.steps)["top1"]
        except UserError:
            return math.nan

    def accuracy(self, network: Network) -> dict[str, float]:
        metrics = evaluate_classification(network, self.test.test(250), ks=(1, 5))
        return {key: 100 * value for key, value in metrics.items()}

    def teacher(self, file: Path) -> Network:
        """The teacher in ``file``, which is trained first where there is none."""
        if not file.is_file():
            network = self.network(TEACHER, 7)
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                task = Solo(network, None, Objective([parse_loss(CROSS_ENTROPY)]))
                task.build(self.train.example(2), self.train.records.num_classes)
                self.trainer(task, 7, TEACHER_STEPS, Path(folder) / "run").fit()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(file, {"network": network.spec.to_dict(), "model": network.state_dict()})
        return restore_network(file, NetworkSpec(TEACHER), {}, "teacher")


def accuracies(bench: Bench, teacher: Network, names: list[str], seeds: int, out: Path | None) -> dict[str, Any]:
    """{arm: a list of results, one per seed}; every arm is printed, and kept in ``out``, when it is done."""
    arms = {
        "alone": ([CROSS_ENTROPY], bench.steps),
        "alone, twice the steps": ([CROSS_ENTROPY], 2 * bench.steps),
        "alone, thrice the steps": ([CROSS_ENTROPY], 3 * bench.steps),
    }
    arms |= {name: ([CROSS_ENTROPY, loss_of(name)], bench.steps) for name in names}
    results: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    for arm, (losses, steps) in arms.items():
        if arm in results:
            continue
        taught = teacher if len(losses) > 1 else None
        results[arm] = [bench.run(losses, seed, taught, steps) for seed in range(seeds)]
        top = [run["top1"] for run in results[arm]]
        print(f"{arm}: {statistics.mean(top):.1f} {[round(value, 1) for value in top]}", flush=True)
        if out is not None:
            out.write_text(json.dumps(results, indent=1))
    return results


def table(results: dict[str, Any], teacher: dict[str, float], steps: int) -> str:
    """Mean and deviation over seeds, and the paired difference from the student alone at equal main steps."""

    def spread(values: list[float]) -> str:
        deviation = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):5.1f}{deviation}"

    alone = [run["top1"] for run in results["alone"]]
    lines = [
        f"teacher ({TEACHER}, {TEACHER_STEPS} steps): top-1 {teacher['top1']:.1f}, top-5 {teacher['top5']:.1f}",
        f"student ({STUDENT}), {len(alone)} seeds, {steps} steps of {BATCH} images in the main stage",
        "",
        f"{'arm':24}{'top-1':>14}{'top-5':>14}{'over alone':>16}{'steps':>7}{'CPU s':>7}",
    ]
    for arm, runs in sorted(results.items(), key=lambda item: -statistics.mean(run["top1"] for run in item[1])):
        gains = [run["top1"] - reference for run, reference in zip(runs, alone, strict=True)]
        over = "" if arm == "alone" else f"{'+' if statistics.mean(gains) >= 0 else ''}{spread(gains).strip()}"
        columns = f"{spread([run['top1'] for run in runs]):>14}{spread([run['top5'] for run in runs]):>14}{over:>16}"
        lines.append(f"{arm:24}{columns}{runs[0]['steps']:>7}{statistics.mean(run['seconds'] for run in runs):>7.0f}")
    return "\n".join(lines)


def cost_of(bench: Bench, teacher: Network, name: str, rounds: int = 12) -> dict[str, float]:
    """Seconds of a step of a method and of ``st``, taken in turn, and the method's memory."""

    def stepper(method: str, folder: Path) -> Trainer:
        losses = [CROSS_ENTROPY, loss_of(method)] if method in METHODS else [CROSS_ENTROPY]
        task = bench.task(losses, 0, teacher if method in METHODS else None)
        trainer = bench.trainer(task, 0, EPOCHS, folder)
        own = isinstance(task, Solo) and not all(term.acts_in_main for _, term in task.objective.items())
        trainer.enter_stage(0 if own else len(trainer.stages) - 1)
        if name == "bss":
            trainer.epoch = EPOCHS // 4  # it rests in the first epochs
        return trainer

    batches = list(bench.train.train(ShuffledBatches(len(bench.train.records), BATCH, 0).epoch(1)[: rounds + 3], 1))
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        trainers = {method: stepper(method, Path(folder) / method) for method in dict.fromkeys((name, "st"))}
        before = reset_peak_memory() or 0
        for batch in batches[:3]:
            trainers[name].trial_step(batch)
        memory = peak_memory() - before
        for batch in batches[:3]:
            trainers["st"].trial_step(batch)
        seconds: dict[str, list[float]] = {method: [] for method in trainers}
        for k, batch in enumerate(batches[3:]):
            for method in list(trainers)[:: 1 if k % 2 else -1]:
                started = time.process_time()
                trainers[method].trial_step(batch)
                seconds[method].append(time.process_time() - started)
    ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["st"], strict=True))
    return {"ms": 1000 * statistics.median(seconds[name]), "ratio": ratio, "mib": memory / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, "alone"], default=list(METHODS))
    parser.add_argument("--choose", action="store_true", help="try other weights, on a tenth of the training images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--teacher", type=Path, help="file of the teacher; trained into it where it does not exist")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--out", type=Path, help="all numbers as JSON; arms that it holds are not run again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.data, options.classes, options.steps, Path(scratch), options.choose)
        teacher = bench.teacher(options.teacher or Path(scratch) / "teacher.pth")
        if options.cost and len(options.methods) == 1:
            print(json.dumps(cost_of(bench, teacher, options.methods[0])))
            return
        if options.cost:
            print_costs(["alone", *options.methods])
            return
        if options.choose:
            for name in options.methods:
                tried = {f: bench.trial([CROSS_ENTROPY, loss_of(name, f)], teacher) for f in FACTORS}
                print(name, {factor: round(top1, 1) for factor, top1 in tried.items()}, flush=True)
            return
        results = accuracies(bench, teacher, options.methods, options.seeds, options.out)
        quality = bench.accuracy(teacher)
        print("\n" + table(results, quality, options.steps))


def print_costs(names: list[str]) -> None:
    """One process per method, so that none inherits another's memory."""
    print(f"{'method':12}{'ms/step':>9}{'of st':>8}{'MiB':>7}", flush=True)
    arguments = [a for a in sys.argv[1:] if a not in METHODS and a not in ("--methods", "alone")]
    for name in dict.fromkeys(names):
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--methods", name], capture_output=True, text=True, check=True
        )
        cost = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:12}{cost['ms']:9.1f}{cost['ratio']:8.2f}{cost['mib']:7.0f}", flush=True)


if __name__ == "__main__":
    main()
