"""Seconds and peak memory of one validation of N synthetic images, pages included.

    PYTHONPATH=src python benchmarks/validate.py [N]

The indexes are whole and valid, two captions per image; each picture is one pixel, since validation reads only the few
that it shows. The data goes into a temporary folder; the validation runs in a process of its own.
"""

import argparse
import hashlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentloom.files import write_json
from latentloom.ingestion import shard_writer, shards
from latentloom.params_file import load_params
from latentloom.validation.runner import validate
from latentloom.validation.tables import LATENT_REJECTS

SHARD_ROWS = 1024  # ingest's, on average
SHARD = "00000.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        STEPS[arguments.step](arguments.data, arguments.images)
        return
    with tempfile.TemporaryDirectory(prefix="latentloom-") as data:
        # Each in its own process, started from this small one: a child's peak memory counts from its parent's.
        for step in STEPS:
            command = [sys.executable, __file__, str(arguments.images), "--step", step, "--data", data]
            subprocess.run(command, check=True)


def measure(data: Path, _: int) -> None:
    started = time.monotonic()
    report = validate(
        data,
        load_params().validate_,
        val_fraction=0.1,
        expected_vae_fingerprint="vae",
        expected_text_fingerprint="text",
        docs_folder=data / "docs",
    )
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(report.explain())
    print(
        f"{report.rows['images']:,} images: {seconds:.1f} s, {time.process_time():.1f} s of CPU, "
        f"peak {peak:.2f} GiB; the machine's load: {os.getloadavg()[0]:.1f}"
    )


def make(data: Path, count: int) -> None:
    """A valid ``data`` folder of ``count`` images, a hundredth as many rejected samples and near duplicates."""
    random = np.random.default_rng(0)
    ids, captions = digests("image", count), digests("caption", count)
    split = np.where([int(own[:8], 16) < 0.1 * 2**32 for own in ids], "validation", "train")
    make_images(data / "images", ids, split, random)
    rejected = range(count // 100)
    write(
        data / "rejects.parquet",
        source="synthetic",
        key=[f"{n}.jpg" for n in rejected],
        reason="truncated",
        detail="the file ends early",
        preview=[None for _ in rejected],
    )
    training = [own for own, part in zip(ids, split, strict=True) if part == "train"][: len(rejected) * 2]
    write(
        data / "near_duplicates.parquet",
        image_id=training[::2],
        twin_id=training[1::2],
        distance=4,
    )
    for cache in ("latents", "text"):
        (data / cache).mkdir()
        (data / cache / SHARD).touch()
    mean, std = random.normal(0, 0.1, count), random.uniform(0.9, 1.1, count)
    scalars = {"mean": mean, "std": std, "finite": True, "shard": SHARD}
    write(
        data / "latents/index.parquet",
        id=ids,
        split=split,
        weight=1.0,
        abs_max=4.0,
        channels=4,
        height=16,
        width=16,
        **scalars,
    )
    write(data / "latents/rejects.parquet", **{name: pa.array([], pa.string()) for name in LATENT_REJECTS})
    write(
        data / "text/index.parquet",
        id=captions,
        text=[f"caption number {n}" for n in range(count)],
        tokens=6,
        norm=1.0,
        dim=384,
        **scalars,
    )
    write(
        data / "text/pairs.parquet",
        image_id=np.repeat(ids, 2),
        caption_id=np.stack([captions, np.roll(captions, -1)], axis=1).ravel(),
    )
    channels = {"mean": [0.0] * 4, "std": [1.0] * 4, "latent_shape": [4, 16, 16], "flip": False}
    write_json(data / "latents/stats.json", {"format_version": 2, "vae": {"fingerprint": "vae"}, **channels})
    write_json(
        data / "text/stats.json",
        {"format_version": 2, "encoder": {"fingerprint": "text"}, "dim": 384, "max_tokens": 77},
    )


def make_images(folder: Path, ids: list[str], split: np.ndarray, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    names = []
    for start in range(0, len(ids), SHARD_ROWS):
        part = ids[start : start + SHARD_ROWS]
        names.append({"name": f"{len(names):05d}.parquet", "rows": len(part)})
        columns = {
            "id": part,
            "image": [{"bytes": buffer.getvalue(), "path": f"{own}.png"} for own in part],
            "captions": [[f"caption {own}", f"another caption {own}"] for own in part],
            "split": split[start : start + SHARD_ROWS],
            "source": ["synthetic"] * len(part),
            "key": [f"{own}.jpg" for own in part],
            "width": random.integers(64, 4000, len(part)),
            "height": random.integers(64, 4000, len(part)),
        }
        table = pa.table([pa.array(columns[field.name], field.type) for field in shards.SCHEMA], schema=shards.SCHEMA)
        pq.write_table(
            table, folder / names[-1]["name"], row_group_size=shards.ROW_GROUP_ROWS, **shard_writer.WRITER_OPTIONS
        )
    kept, rejected = len(ids), len(ids) // 100
    found = kept + rejected
    source = {"name": "synthetic", "weight": 1.0, "found": found, "kept": kept, "rejected": rejected}
    source |= {"attribution": None, "licence": None}
    write_json(
        folder / shards.MANIFEST,
        {"format_version": shards.FORMAT_VERSION, "found": found, "sources": [source], "shards": names},
    )


def write(path: Path, **columns: object) -> None:
    """A Parquet file of ``columns``: each an array, or one value for all rows."""
    rows = max((len(values) for values in columns.values() if is_array(values)), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: of if is_array(of) else [of] * rows for name, of in columns.items()}), path)


def is_array(values: object) -> bool:
    return isinstance(values, Iterable) and not isinstance(values, str)


def digests(what: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{what} {n}".encode()).hexdigest() for n in range(count)]


STEPS = {"make": make, "measure": measure}

if __name__ == "__main__":
    main()
