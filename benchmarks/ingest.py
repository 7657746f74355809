"""How fast the ingest stage prepares images, against a plain Pillow loop; and its peak memory at two sizes of source.

    PYTHONPATH=src python benchmarks/ingest.py
    PYTHONPATH=src python benchmarks/ingest.py --again 20000                         # 1 % new images alone
    PYTHONPATH=src python benchmarks/ingest.py --images 200 --few 200 --many 400     # a quick look

The pictures are made here: smooth colours under noise, so that JPEG and PNG have about a photograph's work with them.
The plain loop opens each file, converts it to RGB, crops the centred square, resizes it with Lanczos' filter and saves
it as a PNG with the same settings, one file each. The stage does so too, and also cleans captions, hashes, looks for
near duplicates and writes Parquet. Each measurement is a process of its own, bound to one CPU or two; rounds alternate,
and the best of each counts, since other work on the machine only ever slows one down. Peak memory is the process's
largest resident set.

Last, a hundredth of the images is added to a source that has been ingested, twice: in a folder of their own, as people
add images, so that most shards stay; then with names everywhere among the others, so that every shard is written anew.
The times are divided by that of a run from nothing; beside them is that of a plain copy of the shards, flushed to the
disk. 20,000 images take 4 GB and some minutes.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import imagehash  # noqa: F401 (here, so that its import is not measured)
import numpy as np
import scipy.fftpack
import scipy.sparse.csgraph  # noqa: F401
from PIL import Image

from latentloom.file_hashes import SETTLED_NS, FileHashes
from latentloom.ingestion import pngs
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.prepared import PreparedStore, recipe
from latentloom.params import IngestParams
from latentloom.params_file import load_params

IMAGE_SIZE = 256
COPIED_AT_ONCE = 2**23


def make_source(folder: Path, images: int, width: int, height: int) -> None:
    """Write ``images`` different JPEGs with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 8, (height, width, 3)).astype(np.float32)
    for number in range(images):
        colours = Image.fromarray(rng.integers(0, 256, (16, 20, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(smooth + np.roll(grain, number, axis=1), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"picture number {number}\n")


def plain_loop(source: Path, out: Path, size: int) -> int:
    """The loop; with two CPUs in as many processes, which shows what a second CPU of this machine is good for."""
    out.mkdir()
    paths, cpus = sorted(source.glob("*.jpg")), len(os.sched_getaffinity(0))
    prepare = partial(prepare_plainly, out, size)
    if cpus == 1:
        for path in paths:
            prepare(path)
    else:
        with ProcessPoolExecutor(cpus) as pool:
            list(pool.map(prepare, paths, chunksize=8))
    return len(paths)


def prepare_plainly(out: Path, size: int, path: Path) -> None:
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    square.resize((size, size), Image.Resampling.LANCZOS).save(out / f"{path.stem}.png", **pngs.OPTIONS)


def settings(source: Path, size: int) -> IngestParams:
    changes = {"source": "folder", "path": str(source), "image_size": size, "limit": None}
    return load_params().ingest.model_copy(update=changes)


def stage(source: Path, out: Path, size: int) -> int:
    params = settings(source, size)
    report = ingest(params, out / "images", out / "rejects.parquet", out / "near_duplicates.parquet", progress=False)
    return report.found


def ingest_again(source: Path, out: Path, size: int) -> tuple[float, float, float, float]:
    """Seconds of an ingestion from nothing without 2 % of the images, and of those after it with 1 % more each: in a
    folder of their own, then everywhere; and of a copy of the shards."""
    state, paths = out / "state", sorted(source.glob("*.jpg"))
    params = settings(source, size)
    everywhere, together = paths[50::100], paths[75::100]
    own_folder, away = source / "new", out / "away"

    def move(images: list[Path], start: Path, end: Path) -> None:
        end.mkdir(exist_ok=True)
        for image in images:
            for name in (image.name, f"{image.stem}.txt"):
                (start / name).rename(end / name)

    def run() -> float:
        hashes = FileHashes(state / "file_hashes")
        time.sleep(SETTLED_NS / 1e9)
        for path in source.rglob("*.*"):  # as the stage before does
            hashes(path)
        hashes.save()
        started = time.perf_counter()
        store = PreparedStore(state / "images", 2**40, recipe(params), FileHashes(state / "file_hashes").known)
        shutil.rmtree(out / "images", ignore_errors=True)  # as DVC does
        outs = out / "images", out / "rejects.parquet", out / "near_duplicates.parquet"
        ingest(params, *outs, progress=False, store=store)
        return time.perf_counter() - started

    move(everywhere + together, source, away)
    whole = run()
    move(together, away, own_folder)
    in_folder = run()
    move(everywhere, away, source)
    return whole, in_folder, run(), copy_flushed(out / "images", out / "copy")


def copy_flushed(folder: Path, to: Path) -> float:
    """Seconds that a copy of the files takes until they are on the disk."""
    started = time.perf_counter()
    to.mkdir()
    for path in folder.iterdir():
        with path.open("rb") as file, (to / path.name).open("wb") as copy:
            shutil.copyfileobj(file, copy, COPIED_AT_ONCE)
            copy.flush()
            os.fsync(copy.fileno())
    return time.perf_counter() - started


def measure_here(task: str, source: Path, size: int) -> dict[str, float]:
    """Run ``task`` in this process; rate in images/s, peak memory in MiB."""
    with tempfile.TemporaryDirectory(dir=source.parent) as out:
        started = time.perf_counter()
        images = {"stage": stage, "loop": plain_loop}[task](source, Path(out) / "out", size)
        rate = images / (time.perf_counter() - started)
    return {"rate": rate, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(task: str, source: Path, cpus: int, size: int = IMAGE_SIZE) -> dict[str, float]:
    """``measure_here`` in a fresh process that may use so many CPUs."""
    allowed = sorted(os.sched_getaffinity(0))[:cpus]
    result = subprocess.run(
        [sys.executable, __file__, "--task", task, "--source", str(source), "--size", str(size)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(result.stdout)


def main(images: int, few: int, many: int, rounds: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "speed"
        make_source(source, images, 680, 512)
        kinds = [(task, cpus) for cpus in (1, 2) for task in ("loop", "stage")][: 2 * len(os.sched_getaffinity(0))]
        rates = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for task, cpus in kinds:
                rates[task, cpus].append(measure(task, source, cpus, size)["rate"])
        loop = max(rates["loop", 1])
        print(f"{images} JPEGs of 680x512 -> {size}x{size}, best of {rounds}")
        for (task, cpus), of_kind in rates.items():
            print(
                f"{task:5s} on {cpus} CPU: {max(of_kind):7.1f} images/s, {max(of_kind) / loop:.2f} of the loop on one"
            )
        peaks = {}
        for count in (few, many):
            source = Path(folder) / f"memory{count}"
            make_source(source, count, 160, 120)
            peaks[count] = measure("stage", source, 2, 64)["peak"]
            print(f"peak memory at {count} images: {peaks[count]:.0f} MiB")
        print(f"ratio: {peaks[many] / peaks[few]:.2f}")
        measure_again(Path(folder), many, size)


def measure_again(folder: Path, images: int, size: int) -> None:
    """Print the times of ingestions with 1 % new images beside that of a whole one."""
    source, out = folder / "again", folder / "outs"
    out.mkdir()
    make_source(source, images, 680, 512)
    whole, in_folder, everywhere, copied = ingest_again(source, out, size)
    print(f"{images} JPEGs of 680x512 -> {size}x{size}, all: {whole:.1f} s")
    print(f"1 % new ones in a folder of their own: {in_folder:.1f} s, {in_folder / whole:.1%}")
    print(f"1 % new ones everywhere among the others: {everywhere:.1f} s, {everywhere / whole:.1%}")
    print(f"a plain copy of the shards: {copied:.1f} s, {copied / whole:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--again", type=int, help="images of which 1 % are new; measures nothing else")
    parser.add_argument("--task", choices=["stage", "loop"])
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(measure_here(arguments.task, arguments.source, arguments.size)))
    elif arguments.again:
        with tempfile.TemporaryDirectory() as folder:
            measure_again(Path(folder), arguments.again, arguments.size)
    else:
        main(arguments.images, arguments.few, arguments.many, arguments.rounds, arguments.size)
