"""`make demo`: a teacher, a student, what distillation gave, and a page that shows it; no download, minutes on two cores.

Runs the same commands that a user would type (they are printed, and stand on the page) on the embedded data set `glyphs`,
evaluates all networks on characters that none of them has seen, and writes one HTML page, whose path it prints last.
"""

import argparse
import json
import platform
import shlex
import time
from pathlib import Path

import torch

from metric_kd.cli.distill import main as distill
from metric_kd.cli.train import main as train
from metric_kd.data import ImageLoader, load_dataset
from metric_kd.data.transforms import Geometry
from metric_kd.deploy.embedder import load
from metric_kd.evaluation.embed import embed
from metric_kd.evaluation.metrics import recall
from metric_kd.evaluation.retrieval import evaluate_retrieval
from metric_kd.report.gallery import pixels_of, retrieval_gallery
from metric_kd.report.page import RunSummary, write_page

KS = [1, 2, 4, 8]
COMMON = "--dataset glyphs --batch 100 --num_image_per_class 5 --schedule cosine --recall 1 2 4 8"
TRIPLET = "l2_triplet:1,sample=distance"
TEACHER = f"{COMMON} --base resnet8_x2:stem_stride=2 --embedding_size 128 --lr 3e-3 --loss {TRIPLET}"
STUDENT = f"{COMMON} --base resnet8_x0.5:stem_stride=2 --embedding_size 16"
RUNS = {
    "teacher": ("run.py", "Teacher", "teacher", f"{TEACHER} --epochs 6"),
    "alone": ("run.py", "Student without a teacher", "alone", f"{STUDENT} --lr 5e-3 --epochs 6 --loss {TRIPLET}"),
    "distilled": (
        "run_distill.py",
        "Student, distilled",
        "distilled",
        f"{STUDENT} --lr 1e-2 --epochs 6 --teacher_load {{out}}/teacher --loss {TRIPLET} "
        "--loss rkd_distance:1 --loss rkd_angle:2",
    ),
    "control": (
        "run.py",
        "Student without a teacher, longer",
        "control",
        f"{STUDENT} --lr 5e-3 --epochs 11 --loss {TRIPLET}",
    ),
}
"""Each student learns at the rate that suited it best of 3e-3, 5e-3, 1e-2 and 2e-2; the last one costs about as much
compute as the distilled one, whose every step asks the teacher too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the runs and the page")
    parser.add_argument("--quick", action="store_true", help="a few steps only: shows that it works, not what it gives")
    options = parser.parse_args()
    started = time.time()
    splits = load_dataset("glyphs", "data")
    loader = ImageLoader(splits.test, Geometry(input_size=32, flip=False))
    runs, found = [], {}
    for number, (name, (script, title, role, flags)) in enumerate(RUNS.items(), start=1):
        arguments = flags.format(out=options.out).split() + ["--save_dir", str(options.out / name)]
        if options.quick:
            arguments += ["--epochs", "1", "--iter_per_epoch", "3"]
        command = f"python {script} {shlex.join(arguments)}"
        print(f"\n{number}/{len(RUNS)} {title}\n$ {command}", flush=True)
        (distill if script == "run_distill.py" else train)(arguments)
        network = load(options.out / name).network
        metrics, found[title] = evaluate_retrieval(embed(network, loader.test(250)), [*KS, 10])
        history = [json.loads(line) for line in (options.out / name / "metrics.jsonl").read_text().splitlines()]
        runs.append(
            RunSummary(
                title=title,
                role=role,
                parameters=sum(p.numel() for p in network.parameters()),
                embedding_size=network.embedding_size,
                recall={k: metrics[f"recall@{k}"] for k in KS},
                seconds=sum(record["seconds"] for record in history),
                history=history,
                command=command,
            )
        )
    gallery = retrieval_gallery(
        found,
        pixels_of(splits.test),
        splits.test.class_names,
        compare=("Student without a teacher", "Student, distilled"),
        k=5,
        title="What the networks find",
    )
    pixels = recall(torch.from_numpy(splits.test.pixels).flatten(1).float(), torch.from_numpy(splits.test.labels), [1])
    page = write_page(
        options.out / "report.html",
        title="What distillation gave",
        intro="A large network (the teacher) and a small one (the student) learn to embed rendered characters so that images "
        "of the same character lie close together. The student is trained three times from the same random weights: on its "
        "own, with a teacher whose distances and angles between images it imitates (relational knowledge distillation), and on "
        "its own again for as long as distillation took. All are tested on characters that none of them has seen.",
        runs=runs,
        galleries=[gallery],
        facts={
            "Training": f"{len(splits.train)} images of {splits.train.num_classes} characters",
            "Test": f"{len(splits.test)} images of {splits.test.num_classes} other characters, each a query against all others",
            "Raw pixels": f"nearest neighbour by pixels, no network: Recall@1 {100 * pixels[1]:.1f}%",
            "Seed": "0",
            "Versions": f"Python {platform.python_version()}, PyTorch {torch.__version__}",
            "Threads": str(torch.get_num_threads()),
        },
    )
    print(f"\ndone in {time.time() - started:.0f} s\n{page.resolve()}")


if __name__ == "__main__":
    main()
