"""An epoch of RKD, resnet50 to resnet18 on photographs, as our trainer runs it and as it is written plainly.

    python benchmarks/bench_epoch.py [--photos DIR] [--quick]

The command is the README's (`run_distill.py --base resnet18 --embedding_size 64 --l2normalize false --teacher_base resnet50
--teacher_embedding_size 512 --dist_ratio 1 --angle_ratio 2`, batches of 64 at 224 px), with random weights; 20 iterations
stand for an epoch. Wall time with two threads, on a machine that does nothing else: both sides take turns of ten
iterations, and the ratio is the median of the turns. Both draw the same rows of the same files, in the page cache.

The reference: a DataLoader with two workers, PIL and float transforms image by image, float32 networks of torchvision on
NCHW, all distances and the N x N x D angles by their formulas, Adam as it is by default. It saves nothing. Ours: the
trainer with pack, bf16 where the CPU multiplies it (else float32), channels_last and fused Adam, with and without the
teacher cache; each turn ends with its checkpoint, which is counted. Making the pack and filling the cache (eight views of
each image) come once before all epochs and are rows of their own.

DIR: a folder of class folders of photographs (or METRIC_KD_PHOTOS); without one, JPEG files are made. Before anything is
timed, the losses of both on one batch in float32 are shown to agree.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from bench_data import PHOTOS, PlainPhotos, same_batches  # noqa: E402
from bench_step import LOSSES, LR, THREADS, WEIGHT_DECAY, PlainStep, as_floats, built, networks, task_of  # noqa: E402
from measure import WALL, Row, Target, show  # noqa: E402

from metric_kd.data import ClassBalancedBatches, Geometry, ImageLoader, ImageRecords  # noqa: E402
from metric_kd.data.folder import scan  # noqa: E402
from metric_kd.data.packing import make_pack  # noqa: E402
from metric_kd.data.views import Views  # noqa: E402
from metric_kd.devices import has_bf16  # noqa: E402
from metric_kd.engine.optimisation import Settings  # noqa: E402
from metric_kd.engine.run_directory import RunDirectory  # noqa: E402
from metric_kd.engine.tasks import Solo  # noqa: E402
from metric_kd.engine.teacher_cache import Teacher, cached  # noqa: E402
from metric_kd.engine.trainer import Trainer  # noqa: E402
from metric_kd.losses.objective import Objective, parse_loss  # noqa: E402

CPU = torch.device("cpu")
AGREEMENT = 1e-3
PX = 224


class Plan(NamedTuple):
    """So many turns of so many iterations on batches of so many images, which the cache holds in so many views."""

    batch: int = 64
    iterations: int = 10
    turns: int = 2
    views: int = 8


def make_photos(folder: Path, classes: int = 10, per_class: int = 24) -> Path:
    """JPEG files of about 100 KiB and 500 x 375 px: shapes with grain, for want of photographs."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"{label:02d}").mkdir(parents=True)
        for number in range(per_class):
            coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((500, 375))
            grain = generator.normal(0, 12, (375, 500, 1))
            pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label:02d}" / f"{number:02d}.jpg", quality=90)
    return folder


def balanced(records: ImageRecords, plan: Plan) -> ClassBalancedBatches:
    """As many images of a class as fill a batch with all classes, and five where there are enough of them."""
    per_class = max(5, -(-plan.batch // records.num_classes))
    return ClassBalancedBatches(records.labels, plan.batch, per_class, plan.iterations, seed=0)


class Plain:
    """The reference's turns."""

    def __init__(self, records: ImageRecords, batches: ClassBalancedBatches):
        self.photos, self.batches, self.step = PlainPhotos(records), batches, PlainStep(*networks())

    def __call__(self, turn: int) -> None:
        order = [rows.tolist() for rows in self.batches.epoch(turn)]
        for images, _ in torch.utils.data.DataLoader(self.photos, batch_sampler=order, num_workers=2):
            self.step(images)


class Ours:
    """The trainer's turns, each an epoch of it."""

    def __init__(self, task: Solo, loader: ImageLoader, batches: ClassBalancedBatches, folder: Path):
        settings = Settings(
            epochs=0, iterations=len(batches), lr=LR, weight_decay=WEIGHT_DECAY, precision=task.precision
        )
        self.trainer = Trainer(task, settings, RunDirectory(folder), loader, batches, CPU)
        folder.mkdir()

    def __call__(self, turn: int) -> None:
        trainer = self.trainer
        trainer.settings = trainer.main_settings = replace(trainer.main_settings, epochs=turn)
        trainer.fit()


def assert_parity(loader: ImageLoader, rows: np.ndarray) -> None:
    """The losses of both on the same crops, in float32."""
    batch = next(iter(loader.train([rows], 1)))
    with torch.no_grad():
        expected = PlainStep(*networks()).loss(as_floats(batch.images))
        total, _ = task_of("fp32", batch)(batch)
    assert abs(total - expected) <= AGREEMENT * abs(expected), (total, expected)


def once(function: Callable[[], Any]) -> tuple[Any, float]:
    """(result, wall seconds) of what is done once before all epochs."""
    started = time.perf_counter()
    result = function()
    return result, time.perf_counter() - started


def in_turns(sides: dict[str, Callable[[int], None]], plan: Plan) -> dict[str, list[float]]:
    """name -> wall seconds of each turn, back and forth (A B C, C B A)."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(1, plan.turns + 1):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            sides[name](turn)
            found[name].append(time.perf_counter() - started)
    return found


def epoch_rows(records: ImageRecords, what: str, plan: Plan, folder: Path) -> list[Row]:
    batches, precision = balanced(records, plan), "bf16" if has_bf16(CPU) else "fp32"
    pack, packing = once(lambda: make_pack(folder / "pack.h5", [records], 256))
    own_loader = ImageLoader(records, Geometry(PX), pack=pack)
    cache_loader = ImageLoader(records, Geometry(PX), pack=pack, views=Views(plan.views))
    first = batches.epoch(1)[0]
    assert same_batches(ImageLoader(records, Geometry(PX)), own_loader, [first]), "a pack must not change what is seen"
    assert_parity(own_loader, first)

    example = own_loader.example(8)
    student, network = networks()
    asked = Teacher(network, CPU, precision, ("embedding",))
    stored, filling = once(lambda: cached(folder / "teacher.h5", asked, cache_loader, batch=plan.batch))
    objective = Objective([parse_loss(loss) for loss in LOSSES])
    with_cache = built(Solo(student, stored, objective, precision), cache_loader.example(8))
    sides: dict[str, Callable[[int], None]] = {
        "plain": Plain(records, batches),
        "cache": Ours(with_cache, cache_loader, batches, folder / "cache"),
        "teacher": Ours(task_of(precision, example), own_loader, batches, folder / "teacher"),
    }
    found = in_turns(sides, plan)
    size = f"{plan.turns * plan.iterations} iterations of {plan.batch}, {PX} px, {len(records)} {what}"
    common = f"{precision}, channels_last, pack, fused Adam"
    titles = {
        "cache": f"RKD epoch by the trainer, {common}, teacher cache",
        "teacher": f"the same, teacher run: {common}",
    }
    targets = {"cache": Target(time=4), "teacher": Target()}
    seconds = {name: sum(times) for name, times in found.items()}
    ahead = {
        name: statistics.median(a / b for a, b in zip(found["plain"], found[name], strict=True)) for name in titles
    }
    against = "PIL, float32, NCHW, plain losses, default Adam"
    rows = [
        Row(titles[name], size, seconds[name], seconds["plain"], ahead[name], None, targets[name], "s", against, WALL)
        for name in titles
    ]
    before = {f"filling the teacher cache, {plan.views} views of each image": filling, "making the pack": packing}
    return [
        *rows,
        *(
            Row(f"once before: {name}", f"{len(records)} {what}", s, None, None, unit="s", clock=WALL)
            for name, s in before.items()
        ),
    ]


def rows(quick: bool = False, photos: str | None = None, plan: Plan | None = None) -> list[Row]:
    """The epoch with and without the teacher cache, and what comes before it."""
    plan = plan or (Plan(batch=10, iterations=1, views=1) if quick else Plan())
    photos = photos or os.environ.get(PHOTOS)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if photos is None:
                print(f"no photographs (--photos DIR or {PHOTOS}): JPEG files are made", file=sys.stderr)
            place = photos or make_photos(Path(folder) / "made", per_class=2 if quick else 24)
            records = scan(place, "photos")
            return epoch_rows(
                records, "JPEG files that were made" if photos is None else "photographs", plan, Path(folder)
            )
    finally:
        torch.set_num_threads(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of class folders of photographs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    show(rows(options.quick, options.photos))
    return 0


if __name__ == "__main__":
    sys.exit(main())
