"""What a student learned by imitation and one that learned from labels keep of an image, on CIFAR-100 and two cores.

    python benchmarks/quantify.py --data DIR --out DIR [--teacher FILE] [--seeds 1] [--photos DIR]

DIR holds CIFAR-100 (as for ``cifar_methods.py``, whose teacher this is: a resnet20 of the first 50 classes). Teacher,
distilled student and baseline have one architecture, as in the paper; the student imitates the teacher's ``--layer``
without labels, the baseline learns from labels, both from scratch for as many steps, with the weights of ``--epochs``
recorded. Then `metric-kd quantify` looks at ``--images`` training images on an 8 x 8 grid, with every setting else as by
default, and prints its table; what is in --out is not done again.

Speed: the same search, one image and one noise draw per forward pass, against the calls that the command makes, in
alternation in one process; the printed ratio is the median of three.

``--photos``: a folder of class folders of photographs; a small network of 96 px is trained on them for three epochs, and
two of the photographs are looked at, on a 16 x 16 grid, to show the page.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cifar_methods import TEACHER, Bench

from metric_kd.cli.distill import main as distill
from metric_kd.cli.quantify import main as quantify
from metric_kd.cli.train import main as train
from metric_kd.data import Geometry, ImageLoader, load_dataset
from metric_kd.engine.checkpoint import restore_network
from metric_kd.quantify import Search, information_discarding
from metric_kd.quantify.maps import feature_of

ROWS = ("n_fg", "ratio", "d_mean", "d_std", "rho")


def networks(options: argparse.Namespace, out: Path, seed: int) -> None:
    """Train the baseline and the student; runs that are finished only say so."""
    flags = ["--task", "classification", "--dataset", "cifar100", "--data", options.data, "--train_classes", "50"]
    flags += ["--base", TEACHER, "--batch", "64", "--epochs", str(options.length), "--iter_per_epoch", "50"]
    flags += ["--schedule", "log", "--lr_decay_gamma", "0.1", "--record_weights", options.epochs, "--seed", str(seed)]
    flags += ["--device", "cpu", "--eval_every", str(options.length)]
    train([*flags, "--lr", "0.05", "--save_dir", str(out / "baseline")])
    taught = ["--teacher_load", str(options.teacher), "--imitate", options.layer, "--lr", str(options.lr)]
    distill([*flags, *taught, "--save_dir", str(out / "distilled")])


def look(options: argparse.Namespace, out: Path) -> dict[str, float]:
    """Quantify, and time it where nothing had been searched before; mean of each metric over all images."""
    known = (out / "quantified" / "maps.h5").exists()
    started = time.perf_counter()
    paths = [
        "--teacher",
        str(options.teacher),
        "--distilled",
        str(out / "distilled"),
        "--baseline",
        str(out / "baseline"),
    ]
    flags = ["--layer", options.layer, "--grid", "8", "--count", str(options.images), "--device", "cpu"]
    quantify([*paths, *flags, "--out", str(out / "quantified")])
    content = json.loads((out / "quantified" / "metrics.json").read_text())
    if not known:
        checkpoints = sum(len(curve["epochs"]) for curve in content["curves"].values())
        seconds = (time.perf_counter() - started) / (checkpoints * options.images)
        print(
            f"{seconds:.2f} s per image and checkpoint ({checkpoints} checkpoints, {torch.get_num_threads()} threads)"
        )
    over_all_images = content["tables"][1]["metrics"]
    means: dict[str, float] = {}
    for key in ROWS:
        row = over_all_images[key]
        known = {name: row[name]["mean"] for name in ("distilled", "baseline") if row[name] is not None}
        means |= {f"{key} {name}": value for name, value in known.items()}
        values = "  ".join(f"{name} {value:.4g}" for name, value in known.items())
        outcome = {True: "held", False: "did not hold", None: "not known"}[row["held"]]
        print(f"{key:8}{values}  expected {row['expected']}: {outcome}")
    return means


def speed(options: argparse.Namespace) -> float:
    """How many times as fast as one image and one draw per forward pass, forward and backward alike."""
    network = restore_network(options.teacher, None, {}).eval()
    splits = load_dataset("cifar100", options.data, task="classification", train_classes=50)
    images = ImageLoader(splits.train, Geometry(input_size=32, flip=False)).example(4).images
    ratios = []
    with feature_of(network, options.layer) as (feature, scale):
        for _ in range(3):
            seconds = []
            for count, iterations, batch in ((1, 1, 1), (4, 4, None)):
                search = Search(grid=8, iterations=iterations)
                started = time.perf_counter()
                information_discarding(feature, images[:count], search, scale=scale, batch=batch)
                seconds.append(
                    (time.perf_counter() - started) / (count * (iterations + 1 / 3))
                )  # one pass has no backward
            ratios.append(seconds[0] / seconds[1])
    one, many = seconds
    print(
        f"speed: {1000 * many:.0f} ms per image and iteration of 96 draws against {1000 * one:.0f} ms one draw at a time: "
        f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})"
    )
    return statistics.median(ratios)


def photographs(options: argparse.Namespace, out: Path) -> None:
    """Two photographs in one network: for the page."""
    flags = [
        "--task",
        "classification",
        "--dataset",
        "folder",
        "--data",
        options.photos,
        "--base",
        "resnet20_x2:stem_stride=2",
    ]
    flags += ["--input_size", "96", "--batch", "32", "--epochs", "3", "--lr", "0.05", "--device", "cpu"]
    train([*flags, "--save_dir", str(out / "photographs")])
    looked = ["--distilled", str(out / "photographs"), "--layer", "conv", "--images", options.photos, "--count", "2"]
    looked += ["--draws", "32", "--antithetic"]  # for a picture, a third of the time
    quantify([*looked, "--device", "cpu", "--out", str(out / "photographs-quantified")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and pages")
    parser.add_argument("--teacher", type=Path, help="file of the teacher; trained into it where it does not exist")
    parser.add_argument("--layer", default="conv")
    parser.add_argument("--lr", type=float, default=0.05, help="rate of the imitation")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--length", type=int, default=10, help="epochs of 50 steps")
    parser.add_argument("--epochs", default="0,1,2,4,7,10", help="whose weights are recorded")
    parser.add_argument("--photos", help="folder of class folders of photographs")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    options.teacher = options.teacher or options.out / "teacher.pth"
    with tempfile.TemporaryDirectory() as scratch:
        Bench(options.data, 50, 500, Path(scratch)).teacher(options.teacher)
    speed(options)
    found = []
    for seed in range(options.seeds):
        networks(options, options.out / f"seed{seed}", seed)
        found.append(look(options, options.out / f"seed{seed}"))
    if len(found) > 1:
        print(f"means and deviations over {len(found)} seeds:")
        for key in found[0]:
            values = [each[key] for each in found if key in each]
            print(f"{key:18} {statistics.fmean(values):.4g} +- {statistics.stdev(values):.2g}")
    if options.photos:
        photographs(options, options.out)


if __name__ == "__main__":
    main()
