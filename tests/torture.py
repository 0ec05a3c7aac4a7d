"""Kill a run many times at random moments and compare its weights with those of a run left alone: `make torture`."""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny import TINY, start, write_images
from tqdm import tqdm


def finish(arguments: list[str], seconds: float | None = None) -> bool:
    """Run to the end, or kill after ``seconds``; whether it came to its end. An exit with an error is a failure here."""
    process = start(arguments)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    assert process.returncode == 0, output.decode()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "images", classes=8, per_class=8)
        # Long enough that it cannot come to its end before the last kill; a checkpoint about every second step.
        steps = ["--epochs", str(16 * options.kills), "--iter_per_epoch", "25", "--save_minutes", "0.0005"]
        common = [*TINY, "--data", str(data), *steps, "--loss", "l2_triplet:1,sample=distance"]
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        for _ in tqdm(range(options.kills), desc="kills"):
            early = finish([*common, "--save_dir", str(broken)], seconds=generator.uniform(1.0, 8.0))
            assert not early, "the run came to its end before the kills did; raise its epochs"
        for run in tqdm((broken, whole), desc="runs to the end"):
            assert finish([*common, "--save_dir", str(run)])
        print(f"{options.kills} kills")
        return compare(whole, broken)


def compare(whole: Path, broken: Path) -> int:
    import torch

    from metric_kd.engine.checkpoint import read_checkpoint

    one, other = (read_checkpoint(run / "best.pth")["model"] for run in (whole, broken))
    different = [key for key in one if not torch.equal(one[key], other[key])]
    print("the weights are equal, bit for bit" if not different else f"different: {different}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
