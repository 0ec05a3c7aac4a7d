"""Kill a run many times at random moments and compare its weights with those of a run left alone: `make torture`."""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, TINY, write_images
from tqdm import tqdm


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "images", classes=8, per_class=8)
        steps = ["--epochs", str(4 * options.kills), "--iter_per_epoch", "25", "--save_minutes", "0.001"]
        common = [*TINY, "--data", str(data), *steps, "--loss", "l2_triplet:1,sample=distance"]
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        process = start([*common, "--save_dir", str(whole)])
        assert process.wait() == 0, process.stderr.read().decode()
        killed = 0
        with tqdm(total=options.kills, desc="kills") as bar:
            while killed < options.kills:
                process = start([*common, "--save_dir", str(broken)])
                try:
                    # a tenth of the kills fall into the start-up, the rest after it
                    assert process.wait(timeout=generator.uniform(0.5, 8.0)) == 0, process.stderr.read().decode()
                    break  # it finished before the kill
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    bar.update()
        started = time.monotonic()
        process = start([*common, "--save_dir", str(broken)])
        assert process.wait() == 0, process.stderr.read().decode()
        print(f"{killed} kills; the last stretch took {time.monotonic() - started:.0f} s")
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
