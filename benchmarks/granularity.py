"""Accuracy of students taught by MAG and MAS on CIFAR-100, beside what they are added to, on two cores.

    python benchmarks/granularity.py --data DIR [--seeds 3] [--out FILE.json]

Networks, images, recipe and controls are those of ``cifar_methods.py``: the first 50 classes, a resnet20 teacher, a resnet8
of half the width as the student. The teacher's coders are fitted once (``--teacher``, ``--coders`` FILE keep both) for
2,000 steps of SGD at 0.01, a tenth after half and after three quarters. Every arm of a seed starts from the same weights
and sees the same batches. "st" is logit distillation at temperature 4 with weight 1; MAG adds the codes' term with weight
1, MAS also makes the average of the teacher and its decoders the target of st. "at" alone has no logit target while MAS with
at has st too, so that "at and st" stands between them. Two arms without a teacher: cross entropy for as many steps, and for
twice as many. One pair of small networks, a budget far from the paper's 240 epochs: the table says what each arm gave
here, not what it gives in general.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from cifar_methods import BATCH, CPU, CROSS_ENTROPY, Bench, loss_of, table

from metric_kd.data.batches import ShuffledBatches
from metric_kd.distill.granularity import ABSTRACT, BRANCHES, DETAILED, CodedTeacher, Coders
from metric_kd.engine.checkpoint import write_checkpoint
from metric_kd.engine.coding import Coding, Decoded, coders_for, read_coders
from metric_kd.engine.optimisation import Settings
from metric_kd.engine.run_directory import RunDirectory
from metric_kd.engine.trainer import Trainer
from metric_kd.models import Network

CODER_EPOCHS, CODER_STEPS = 20, 2000
ST, AT, CODES = "st:1,temperature=4", loss_of("at"), "granularity:1"
ARMS = {
    "st": ([ST], None),
    "MAG with st": ([ST, CODES], "mag"),
    "MAS with st": ([ST, CODES], "mas"),
    "at": ([AT], None),
    "at and st": ([AT, ST], None),
    "MAS with at": ([AT, ST, CODES], "mas"),
}
"""The losses beside cross entropy, and which teacher: plain, with its codes (mag), and with the stable target (mas)."""


def coders_of(bench: Bench, teacher: Network, file: Path) -> Coders:
    """The coders in ``file``, which are fitted first where there is none."""
    if not file.is_file():
        torch.manual_seed(11)
        coders = coders_for(teacher, "logits", ABSTRACT, DETAILED)
        settings = Settings(
            epochs=CODER_EPOCHS,
            iterations=CODER_STEPS // CODER_EPOCHS,
            lr=0.01,
            optimizer="sgd",
            nesterov=False,
            weight_decay=5e-4,
            lr_decay_epochs=(CODER_EPOCHS // 2 + 1, 3 * CODER_EPOCHS // 4 + 1),
            seed=11,
            save_minutes=1e9,
        )
        records = bench.train.records
        batches = ShuffledBatches(len(records), BATCH, 11, iterations=settings.iterations)
        started = time.process_time()
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            task = Coding(coders, teacher)
            task.build(bench.train.example(2), records.num_classes)
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                Trainer(task, settings, RunDirectory(folder), bench.train, batches, CPU).fit()
        print(f"coders: {CODER_STEPS} steps, {time.process_time() - started:.0f} CPU s", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(file, {"coders": coders.spec.to_dict(), "model": coders.state_dict()})
    return read_coders(file, teacher).eval()


def accuracies(bench: Bench, teacher: Network, coders: Coders, seeds: int, out: Path | None) -> dict[str, Any]:
    """{arm: a list of results, one per seed}; every result is printed, and kept in ``out``, when it is there."""
    arms: dict[str, tuple[list[str], str | None, int]] = {
        "alone": ([], None, bench.steps),
        "alone, twice the steps": ([], None, 2 * bench.steps),
        "alone, three times the steps": ([], None, 3 * bench.steps),
    }
    arms |= {name: (losses, which, bench.steps) for name, (losses, which) in ARMS.items()}
    results: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    for seed in range(seeds):
        for arm, (losses, which, steps) in arms.items():
            done = results.setdefault(arm, [])
            if len(done) > seed:
                continue
            taught = teacher if which is None else CodedTeacher(teacher, coders, stable=which == "mas")
            done.append(bench.run([CROSS_ENTROPY, *losses], seed, taught if losses else None, steps))
            print(f"seed {seed}, {arm}: {done[-1]['top1']:.1f} in {done[-1]['seconds']:.0f} CPU s", flush=True)
            if out is not None:
                out.write_text(json.dumps(results, indent=1))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--teacher", type=Path, help="file of the teacher; trained into it where it does not exist")
    parser.add_argument(
        "--coders", type=Path, help="file of the teacher's coders; fitted into it where it does not exist"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="all numbers as JSON; runs that it holds are not repeated")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.data, options.classes, options.steps, Path(scratch))
        teacher = bench.teacher(options.teacher or Path(scratch) / "teacher.pth")
        coders = coders_of(bench, teacher, options.coders or Path(scratch) / "coders.pth")
        results = accuracies(bench, teacher, coders, options.seeds, options.out)
        print("\n" + table(results, bench.accuracy(teacher), options.steps))
        for branch in BRANCHES:
            decoded = bench.accuracy(Decoded(teacher, coders, branch))  # type: ignore[arg-type]
            print(f"{branch} decoder of the teacher: top-1 {decoded['top1']:.1f}")
        plain, stable = ([run["top1"] for run in results[arm]] for arm in ("st", "MAS with st"))
        gaps = [ours - theirs for ours, theirs in zip(stable, plain, strict=True)]
        print(f"MAS with st over st, seed by seed: {', '.join(f'{gap:+.1f}' for gap in gaps)}")
        if len(gaps) > 1:
            print(f"mean {statistics.mean(gaps):+.1f}, deviation {statistics.stdev(gaps):.1f}")


if __name__ == "__main__":
    main()
