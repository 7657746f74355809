"""How time and memory of every stage's bookkeeping grow with the number of images: 0.1, 1 and 10 million.

Nothing is decoded, encoded or trained: what is measured is what a stage does for each row beside that. All is
synthetic: pictures of one pixel, shards of tensors that take no room on the disk. Each in a process of its own:

    find_sources  lists and hashes a folder with a file for each image, 10,000 to a subfolder, the first time
    ingest        a stream of prepared rows, a hundredth of them duplicates and a hundredth rejected -> what is kept,
                  the table of rejects, near duplicates and the splits
    plan          both encode stages, up to where the first row would be computed
    validate      all checks and the page
    open          a training's data with streamed rows, up to the first batch
    epoch         the order of an epoch's rows; peak memory is that of opening, too

`peak` is of the whole process, the libraries included (some 400 MiB where torch is one); `mapped` are the pages of
files in it at the end, which the system takes back when it needs the memory.

    PYTHONPATH=src python benchmarks/growth.py [--rows 100000 1000000 10000000] [--stages ingest validate ...]

Ten million rows take 8 GB of disk in a temporary folder, which is removed; their files for find_sources, which are
made, listed and removed in some 20 minutes, 3 GB more.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from synthetic import DIM, memory, write_caches

from latentloom.ids import ascending, to_hex
from latentloom.ingestion import pngs, shard_writer, shards

SHARD_ROWS = 2**14
FILES = 10_000  # in a folder
KEY = "images/{:09}.jpg"
FINGERPRINT = "0" * 64


def write_data(data: Path, rows: int) -> None:
    """A valid ``data`` folder of ``rows`` images, one caption each, and a hundredth as many pairs that look alike."""
    held_out = rows // 10
    write_caches(data, rows, held_out, holes=True)
    ids = np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8)  # those of the caches
    write_images(data / "images", ids, rows - held_out)
    alike = to_hex(ids[: rows // 50])
    write(data / "near_duplicates.parquet", image_id=alike[::2], twin_id=alike[1::2], distance=[4] * (rows // 100))
    rejected = range(rows // 100)
    texts = {"source": "synthetic", "key": "", "reason": "truncated", "detail": "the file ends early"}
    columns = {name: pa.array([text] * len(rejected), pa.string()) for name, text in texts.items()}
    columns["key"] = [f"{KEY.format(number)}: part" for number in rejected]
    write(data / "rejects.parquet", **columns, preview=pa.nulls(len(rejected), pa.binary()))
    write(data / "latents/rejects.parquet", **{name: pa.array([], pa.string()) for name in ("id", *texts)})
    sample = to_hex(ids[:64])
    write(data / "latents/reconstructions.parquet", id=sample, psnr=[30.0] * 64, preview=pa.nulls(64, pa.binary()))


def write_images(folder: Path, ids: np.ndarray, train: int) -> None:
    """Shards of images, of which the first ``train`` are in that split."""
    folder.mkdir(parents=True)
    buffer, names = io.BytesIO(), []
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    for start in range(0, len(ids), SHARD_ROWS):
        own = to_hex(ids[start : start + SHARD_ROWS])
        size, numbers = len(own), range(start, start + len(own))
        image = pa.StructArray.from_arrays([pa.array([buffer.getvalue()] * size), own], ["bytes", "path"])
        columns = {
            "id": own,
            "image": image,
            "captions": pa.ListArray.from_arrays(
                pa.array(np.arange(size + 1, dtype=np.int32)), pa.array([f"caption {number}" for number in numbers])
            ),
            "split": np.where(np.asarray(numbers) < train, "train", "validation"),
            "source": ["synthetic"] * size,
            "key": [KEY.format(number) for number in numbers],
            "width": np.full(size, 640, np.int32),
            "height": np.full(size, 480, np.int32),
        }
        names.append({"name": f"{len(names):05d}.parquet", "rows": size})
        table = pa.table(columns).cast(shards.SCHEMA)
        pq.write_table(
            table, folder / names[-1]["name"], row_group_size=shards.ROW_GROUP_ROWS, **shard_writer.WRITER_OPTIONS
        )
    source = shard_writer.SourceCount("synthetic", "folder", 1.0, None, None, len(ids), len(ids), 0)
    shard_writer.write_manifest(folder, 128, train, [source], names)


def write(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path)


def find_sources(folder: Path, rows: int) -> Callable[[], object]:
    from latentloom.ingestion.fingerprints import fingerprint_sources
    from latentloom.params import SourceParams

    source = folder / "source"
    for start in range(0, rows, FILES):  # hard links: they are listed as files are, and made sooner
        own = source / f"{start // FILES:05}"
        own.mkdir(parents=True)
        (own / "0.jpg").touch()
        for number in range(1, min(FILES, rows - start)):
            os.link(own / "0.jpg", own / f"{number}.jpg")
    return lambda: fingerprint_sources([SourceParams(source="folder", path=str(source))], folder / "sources.json")


def ingest(folder: Path, rows: int) -> Callable[[], object]:
    from latentloom.ingestion.deduplicator import Deduplicator
    from latentloom.ingestion.near_duplicates import find_near_duplicates, write_near_duplicates
    from latentloom.ingestion.splits import linked_to_train

    def run() -> None:
        counts = {"synthetic": shard_writer.SourceCount("synthetic", "folder", 1.0, None, None)}
        deduplicator = Deduplicator(counts)
        for _ in deduplicator.kept(prepared_rows(rows)):
            pass
        deduplicator.rejects.write(folder / "rejects.parquet")
        images, in_train, signatures = deduplicator.ids(), deduplicator.in_train(), deduplicator.signatures()
        order = ascending(images)
        pairs = find_near_duplicates(signatures, 8, order)
        write_near_duplicates(folder / "near_duplicates.parquet", images[order], pairs)
        linked_to_train(pairs, in_train[order])

    return run


def prepared_rows(rows: int) -> Iterator[object]:
    """Every hundredth a duplicate of the one before it, every hundredth a reject, every hundredth a near duplicate."""
    from latentloom.ingestion.near_duplicates import SIGNATURE_BYTES
    from latentloom.ingestion.rejects import Reason, Reject

    png = pngs.encode(np.zeros((1, 1, 3), np.uint8))
    for start in range(0, rows, FILES):
        random = np.random.default_rng(start)
        ids, signatures = random.bytes(32 * FILES).hex(), random.bytes(SIGNATURE_BYTES * FILES)
        for own in range(min(FILES, rows - start)):
            key, kind = KEY.format(start + own), own % 100
            if kind == 1:
                yield Reject("synthetic", key, Reason.TRUNCATED, "the file ends early")
                continue
            of_id, of_signature = (own - (kind == known) for known in (3, 5))
            yield shard_writer.ImageRow(
                id=ids[64 * of_id : 64 * of_id + 64],
                png=png,
                captions=["a caption"],
                split="validation" if own % 10 == 0 else "train",
                source="synthetic",
                key=key,
                width=640,
                height=480,
                signature=signatures[SIGNATURE_BYTES * of_signature : SIGNATURE_BYTES * (of_signature + 1)],
            )


def plan(folder: Path, _: int) -> Callable[[], object]:
    from latentloom.encoding.captions import Captions, plan_captions
    from latentloom.encoding.latents import ImageRows, plan_latents
    from latentloom.encoding.row_store import RowStore

    images, out = folder / "data/images", folder / "planned"
    store = RowStore(folder / "store", 2**30)
    vae = SimpleNamespace(fingerprint=FINGERPRINT, precision="fp32", latent_bytes=lambda pixels: pixels // 8)
    encoder = SimpleNamespace(fingerprint=FINGERPRINT, pooling="mean", max_tokens=77, dim=DIM)

    def run() -> None:
        plan_latents(vae, images, ImageRows(images, shards.read_manifest(images)), out, store)
        plan_captions(encoder, Captions(images, out / "pairs.parquet"), out, store, tokens=False)

    out.mkdir()
    return run


def validate(folder: Path, _: int) -> Callable[[], object]:
    from latentloom.params_file import load_params
    from latentloom.validation.runner import validate

    limits = load_params().validate_

    def run() -> None:
        report = validate(
            folder / "data",
            limits,
            val_fraction=0.1,
            expected_vae_fingerprint=FINGERPRINT,
            expected_text_fingerprint=FINGERPRINT,
            docs_folder=folder / "docs",
        )
        if not report.success:
            raise SystemExit(report.explain())

    return run


def open_training(folder: Path, _: int) -> Callable[[], object]:
    from streaming import batches_of

    from latentloom.encoding.dataset import load_caches

    def run() -> None:
        caches = load_caches(folder / "data/latents", folder / "data/text", memory_share=0.0)
        next(batches_of(caches.train, range(1)))

    return run


def epoch(folder: Path, _: int) -> Callable[[], object]:
    from streaming import BATCH, BLOCK_ROWS

    from latentloom.encoding.dataset import load_caches
    from latentloom.training.epochs import Blocks, epoch_rows

    data = load_caches(folder / "data/latents", folder / "data/text", memory_share=0.0).train
    blocks = Blocks.of(len(data), len(data), BATCH, BLOCK_ROWS)
    return lambda: epoch_rows(0, 0, len(data), blocks=blocks, stored=data.stored)


STAGES = {
    "find_sources": find_sources,
    "ingest": ingest,
    "plan": plan,
    "validate": validate,
    "open": open_training,
    "epoch": epoch,
}


def measure(stage: str, folder: Path, rows: int) -> dict[str, float]:
    """Seconds of a stage, and this process's memory at its end."""
    run = STAGES[stage](folder, rows)
    started = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - started} | memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--folder", type=Path, help="where the temporary folders are made")
    parser.add_argument("--step", choices=("write", *STAGES), help=argparse.SUPPRESS)  # what the processes are given
    arguments = parser.parse_args()
    if arguments.step == "write":
        write_data(arguments.folder / "data", *arguments.rows)
        return
    if arguments.step:
        print(json.dumps(measure(arguments.step, arguments.folder, *arguments.rows)))
        return
    print("      rows         stage   seconds  peak, MiB  mapped, MiB")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            needs_data = {*arguments.stages} - {"find_sources", "ingest"}
            for step in (["write"] if needs_data else []) + arguments.stages:
                command = [sys.executable, __file__, "--rows", str(rows), "--folder", name, "--step", step]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                if step != "write":
                    own = json.loads(done.stdout.splitlines()[-1])
                    figures = f"{own['seconds']:8.1f}  {own['VmHWM']:9,.0f}  {own['RssFile']:11,.0f}"
                    print(f"{rows:10,}  {step:>12}  {figures}", flush=True)


if __name__ == "__main__":
    main()
