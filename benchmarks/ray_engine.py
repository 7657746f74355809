"""`encode_images` on Ray against this process, on synthetic images and the bundled VAE.

    local      this process, two threads
    ray        a cluster of this machine: one worker with two cores
    one node   a cluster of one node with one core: all of its processes, the stage's too, share that core
    two nodes  a cluster of two nodes with one core each, all on this machine

Each case runs in a process of its own, with --images and with a fifth of them, into fresh folders with an empty row
store. The rate is that of the images between the two, so that it holds no start-up: of Ray, its workers, the libraries
and the encoder. That is given apart, as what is left of the smaller run. The cases take turns for --rounds rounds;
figures are medians.

Images have 64x64 pixels, a quarter of the work of the usual 128x128, so what an image costs Ray weighs more here.
Shards have some 1,000 rows, so that there are as many tasks for each worker as in a set of some 100,000 images.

    PYTHONPATH=src python benchmarks/ray_engine.py [--images 20000] [--rounds 1]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from latentloom import sharding
from latentloom.encoding.latents import encode_images
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.vae import Vae
from latentloom.ingestion.images import image_id
from latentloom.ingestion.pngs import encode
from latentloom.ingestion.shard_writer import ImageRow, SourceCount, write_manifest, write_shards

CASES = {"local": 0, "ray": 0, "one node": 1, "two nodes": 2}  # nodes of a cluster that is made for the case
SIZE, SHARD = 64, sharding.ShardBytes(2**18, 2**18, 2**20)


def prepare(folder: Path, images: int) -> None:
    """Write images as `ingest` does: soft patches of colour."""
    random = np.random.default_rng(0)

    def rows() -> Iterator[ImageRow]:
        for number in range(images):
            patches = random.integers(0, 240, (8, 8, 3), dtype=np.uint8).repeat(SIZE // 8, 0).repeat(SIZE // 8, 1)
            pixels = patches + random.integers(0, 16, patches.shape, dtype=np.uint8)
            yield ImageRow(image_id(pixels), encode(pixels), ["patches"], "train", "made", f"{number}", SIZE, SIZE)

    count = SourceCount("made", "folder", 1.0, None, None, found=images, kept=images)
    write_manifest(folder, SIZE, images, [count], write_shards(rows(), folder))


@contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """Have `RAY_ADDRESS` name a cluster of so many nodes with one core; none where 0."""
    if not nodes:
        yield
        return
    os.sched_setaffinity(0, set(range(nodes)))  # of all processes from here on
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, object_store_memory=200 * 2**20, include_dashboard=False)
        os.environ["RAY_ADDRESS"] = made.address
        yield
    finally:
        ray.shutdown()
        made.shutdown()


def run(case: str, images: Path) -> float:
    """How long the stage takes."""
    os.environ["LATENTLOOM_ENGINE"] = "local" if case == "local" else "ray"
    sharding.TENSORS = SHARD
    with cluster(CASES[case]), tempfile.TemporaryDirectory(dir=images.parent) as folder:
        started = time.perf_counter()
        encode_images(Vae("bundled"), images, Path(folder, "latents"), RowStore(Path(folder, "store"), 2**40))
        return time.perf_counter() - started


def measured(case: str, images: Path) -> float:
    """`run` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"TQDM_DISABLE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, __file__, "--case", case, "--folder", images]
    return json.loads(
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case, options.folder)))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        sizes = {"all": options.images, "part": options.images // 5}
        for name, images in sizes.items():
            prepare(folder / name, images)
        rates: dict[str, list[float]] = {case: [] for case in CASES}
        starts: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(options.rounds):
            for case in CASES:
                part, whole = (measured(case, folder / name) for name in ("part", "all"))
                rates[case].append((sizes["all"] - sizes["part"]) / (whole - part))
                starts[case].append(part - sizes["part"] / rates[case][-1])
    finally:
        shutil.rmtree(folder)
    rate = {case: median(own) for case, own in rates.items()}
    print(f"| {options.images:,} images of {SIZE}x{SIZE} | images/s | start-up, s | against |\n|---|---|---|---|")
    for case in CASES:
        other = {"ray": "local", "two nodes": "one node"}.get(case)
        ratio = f"{rate[case] / rate[other]:.2f} times {other}" if other else ""
        print(f"| {case} | {rate[case]:.0f} | {median(starts[case]):.1f} | {ratio} |")


if __name__ == "__main__":
    main()
