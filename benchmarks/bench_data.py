"""The input pipeline: packs, decoding and normalisation against PIL and float transforms image by image.

    python benchmarks/bench_data.py --photos DIR [--quick]

DIR: any folder of class folders of photographs (or METRIC_KD_PHOTOS); without it only what needs no photographs is
measured. One thread, process CPU time, rounds interleaved, files in the page cache. The peer is the chain of the RKD
reference: open, convert, Resize((256, 256)), RandomCrop(224), RandomHorizontalFlip, ToTensor, Normalize, in a DataLoader
without workers where batches are measured. Before anything is timed, batches from the pack are shown to equal those from
the files bit for bit, and the files as we read them to equal PIL's to 50 dB.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from measure import Row, Target, compared, interleaved, ratio, show  # noqa: E402

from metric_kd.data import Geometry, ImageLoader, ImageRecords, decode  # noqa: E402
from metric_kd.data.folder import scan  # noqa: E402
from metric_kd.data.packing import make_pack  # noqa: E402
from metric_kd.models import NetworkSpec, build_network  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOS = "METRIC_KD_PHOTOS"
CHAIN = "PIL and transforms"


def plain_chain() -> Callable[[Any], Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((256, 256)),
            transforms.RandomCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class PlainPhotos(torch.utils.data.Dataset):
    """What the reference trains on: a file, PIL, and a chain of transforms."""

    def __init__(self, records: ImageRecords):
        self.records, self.chain = records, plain_chain()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        assert self.records.paths is not None
        with Image.open(self.records.paths[row]) as image:
            return self.chain(image.convert("RGB")), int(self.records.labels[row])


def worst_agreement(records: ImageRecords) -> float:
    """The lowest PSNR, in dB, between a file as the loader reads it and as PIL does, over centre crops."""
    from PIL import Image

    worst = np.inf
    assert records.paths is not None
    for batch in ImageLoader(records, Geometry(224, flip=False)).test(32):
        for row, ours in zip(batch.indices.tolist(), batch.images, strict=True):
            with Image.open(records.paths[row]) as image:
                whole = np.asarray(image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR))
            gap = ours.permute(1, 2, 0).numpy().astype(float) - whole[16:240, 16:240]
            worst = min(worst, 10 * np.log10(255**2 / max(np.square(gap).mean(), 1e-9)))
    return float(worst)


def same_batches(one: ImageLoader, other: ImageLoader, batches: list[np.ndarray]) -> bool:
    pairs = zip(one.train(batches, 1), other.train(batches, 1), strict=True)
    return all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)


def photo_rows(photos: str, quick: bool, folder: str) -> list[Row]:
    records = scan(photos, "photos")
    assert records.paths is not None
    pack = make_pack(Path(folder) / "photos.h5", [records], 256)
    files = ImageLoader(records, Geometry(224))
    packed = ImageLoader(records, Geometry(224), pack=pack)
    generator = np.random.default_rng(0)
    size = min(16 if quick else 64, len(records))
    batches = [generator.choice(len(records), size, replace=False) for _ in range(8)]
    assert same_batches(files, packed, batches[:2]), "a pack must not change what is seen"
    worst = worst_agreement(records.select(np.arange(0, len(records), 8 if quick else 1)))
    assert worst >= 50, f"PIL and the loader differ: {worst:.1f} dB"

    network = build_network(NetworkSpec("resnet18"))
    plain = PlainPhotos(records)
    turn = iter(range(10**9))

    def rows() -> np.ndarray:
        return batches[next(turn) % len(batches)]

    def one_by_one() -> Any:
        return [plain[int(row)][0] for row in rows()]

    def plain_batch() -> Any:
        return next(iter(torch.utils.data.DataLoader(plain, batch_size=size, sampler=rows().tolist())))

    def ours(loader: ImageLoader, normalise: bool) -> Callable[[], Any]:
        def read() -> Any:
            images = next(iter(loader.train([rows()], 1))).images
            return network.normalise(images) if normalise else images

        return read

    found = interleaved(
        {
            "plain": one_by_one,
            "plain batch": plain_batch,
            "pack": ours(packed, False),
            "pack batch": ours(packed, True),
            "files": ours(files, False),
            "files batch": ours(files, True),
        },
        rounds=2 if quick else 5,
    )
    where = f"{len(records)} photographs, batches of {size}, 224 px"
    agreement = f"worst {worst:.0f} dB"
    asked = [
        ("random image to uint8 crop, from a pack", "pack", "plain", 20.0),
        ("loader without workers to normalised batch, from a pack", "pack batch", "plain batch", 8.0),
        (f"decode, resize and crop on line ({agreement})", "files", "plain", 1.5),
        (f"loader without workers to normalised batch, from files ({agreement})", "files batch", "plain batch", None),
    ]
    return [
        Row(
            name,
            where,
            *(size / statistics.median(found[key]) for key in (own, peer)),
            ratio(found, own, peer),
            target=Target(time=least),
            unit="img/s",
            against=CHAIN,
        )
        for name, own, peer, least in asked
    ]


def normalise_row(quick: bool) -> Row:
    """uint8 to normalised floats of one batch that is in memory."""
    from PIL import Image
    from torchvision import transforms

    count = 16 if quick else 64
    pixels = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    pictures = [Image.fromarray(image) for image in pixels]
    chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    network = build_network(NetworkSpec("resnet18"))

    def plain() -> Tensor:
        return torch.stack([chain(picture) for picture in pictures])

    def ours() -> Tensor:
        return network.normalise(batch)

    torch.testing.assert_close(ours(), plain(), rtol=0, atol=1e-6)
    found = interleaved({"ours": ours, "plain": plain}, rounds=2 if quick else 5)
    target = Target(time=8, tuned=3)
    return compared(
        "normalise a batch", f"{count}x3x224x224", found, "ours", "plain", target, against="ToTensor, stack"
    )


def rows(quick: bool, photos: str | None = None) -> list[Row]:
    """All comparisons of this file; without a folder of photographs, those that need none."""
    photos = photos or os.environ.get(PHOTOS)
    found = [normalise_row(quick)]
    if photos is None:
        print(f"no photographs: give --photos DIR or {PHOTOS} to measure packs and decoding", file=sys.stderr)
        return found
    threads, decode.THREADS = decode.THREADS, 1  # like the peer; more cores read more files at once
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [*photo_rows(photos, quick, folder), *found]
    finally:
        decode.THREADS = threads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of class folders of photographs")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    show(rows(options.quick, options.photos))
    return 0


if __name__ == "__main__":
    sys.exit(main())
