"""A million vectors in one index file: time to build it, peak memory, time per query, and what it loses.

    python benchmarks/index_million.py [--count 1000000] [--dimensions 128] [--factories Flat auto ...] [--threads 1]

Vectors of length 1 about 20,000 centres, drawn block by block into a file. Each index is built in a process of its own and
opened in another one; the peak is the largest resident memory of that process, libraries (last line) included, and while it
is built also the pages of the file of vectors, which the system can take back. ms per query: one query at a time; recall:
1,000 of the index's own vectors, themselves left out, against exact search.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CENTRES, SPREAD, BLOCK = 20_000, 0.6, 50_000
FACTORIES = ["Flat", "IVF4000,Flat", "IVF4000,PQ32", "IVF4000,PQ32+float16", "HNSW16"]
"""What follows a plus is --keep_vectors."""


def draw(path: Path, count: int, dimensions: int) -> None:
    """Vectors of length 1, float32, one after the other."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, dimensions), np.float32)
    with path.open("wb") as file:
        for start in range(0, count, BLOCK):
            generator = np.random.default_rng([1, start])
            size = min(BLOCK, count - start)
            x = centres[generator.integers(0, CENTRES, size)]
            x += SPREAD * generator.standard_normal((size, dimensions), np.float32)
            file.write((x / np.linalg.norm(x, axis=1, keepdims=True)).tobytes())


def peak() -> float:
    """MB of resident memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def start(threads: int) -> float:
    """Load the libraries; the memory that they take."""
    import torch

    from metric_kd.evaluation.search import load_faiss

    torch.set_num_threads(threads)
    load_faiss()
    return peak()


def build_one(vectors: str, count: int, dimensions: int, factory: str, file: str, threads: int) -> dict:
    base = start(threads)
    from metric_kd.deploy.factory import choose_factory, parse_factory
    from metric_kd.deploy.index_file import About, Files, IndexFile, write_index
    from metric_kd.deploy.vector_index import build

    held = np.memmap(vectors, np.float32, "c", 0, (count, dimensions))
    began = time.perf_counter()
    words, _, keep = factory.partition("+")
    kind = choose_factory(count, dimensions) if words == "auto" else parse_factory(words)
    index = build(kind, held, keep or None)
    numbers = np.zeros(count, np.int64)
    about = About("none", "none", "none", True, "/images", "fp32", dimensions, factory, None)
    files = Files([f"{k:07d}.jpg" for k in range(count)], numbers, numbers)
    write_index(Path(file), IndexFile(about, files, index))
    name = f"{kind}+{keep}" if keep else str(kind)
    return {"factory": name, "seconds": time.perf_counter() - began, "build": peak(), "base": base}


def search_one(vectors: str, count: int, dimensions: int, factory: str, file: str, threads: int) -> dict:
    start(threads)
    from metric_kd.deploy.index_file import read_index
    from metric_kd.deploy.measuring import measure
    from metric_kd.deploy.searcher import Searcher

    searcher = Searcher(file)
    for row in range(0, count, count // 100):  # read, not mapped: pages of the map would be counted
        searcher.search(np.fromfile(vectors, np.float32, dimensions, offset=4 * dimensions * row), 10)
    opened = peak()
    del searcher
    held = np.memmap(vectors, np.float32, "c", 0, (count, dimensions))
    found = measure(read_index(file).index, vectors=held)
    return {"search": opened, "ms": found.ms, "r1": found.recall1, "r10": found.recall10, "each": found.bytes_each}


def in_a_process(step: str, *arguments: object) -> dict:
    words = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--factories", nargs="+", default=FACTORIES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vectors, file = Path(folder) / "vectors", Path(folder) / "index"
        draw(vectors, options.count, options.dimensions)
        size = vectors.stat().st_size / 1e6
        print(f"{options.count:,} vectors of {options.dimensions} numbers: {size:,.0f} MB; {options.threads} threads")
        print(
            "factory              build s  peak MB: build  search   MB of file  bytes each  ms/query  recall@1  recall@10"
        )
        for factory in options.factories:
            words = (vectors, options.count, options.dimensions, factory, file, options.threads)
            made, found = in_a_process("build", *words), in_a_process("search", *words)
            print(
                f"{made['factory']:20} {made['seconds']:7.0f}  {made['build']:14,.0f}  {found['search']:6,.0f}  "
                f"{file.stat().st_size / 1e6:11,.0f}  {found['each']:10.0f}  {found['ms']:8.2f}  {100 * found['r1']:7.1f}%"
                f"  {100 * found['r10']:8.1f}%",
                flush=True,
            )
        print(f"the libraries alone: {made['base']:,.0f} MB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step = {"build": build_one, "search": search_one}[sys.argv[2]]
        one, count, dimensions, factory, file, threads = sys.argv[3:]
        print(json.dumps(step(one, int(count), int(dimensions), factory, file, int(threads))))
    else:
        main()
