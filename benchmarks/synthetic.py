"""Synthetic caches for benchmarks: rows of random numbers, in the form that the encode stages leave; and memory."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from latentloom.encoding import captions, latents
from latentloom.encoding.cache import FORMAT_VERSION, save_shard
from latentloom.encoding.index_files import write_table
from latentloom.files import write_json
from latentloom.ids import to_hex
from latentloom.sharding import TENSORS, shard_ranges

SHAPE, DIM = (4, 16, 16), 384


def synthetic(rows: range) -> tuple[np.ndarray, np.ndarray]:
    """Latents (N, 4, 16, 16) and embeddings (N, 384) of ``rows``, fp16."""
    random = np.random.default_rng(rows.start)
    latents = random.standard_normal((len(rows), *SHAPE), dtype=np.float32)
    return latents.astype(np.float16), random.standard_normal((len(rows), DIM), dtype=np.float32).astype(np.float16)


def write_caches(folder: Path, rows: int, validation: int = 0, *, std: bool = False, holes: bool = False) -> None:
    """Write ``latents`` and ``text`` in ``folder``, one caption per image; hold the last ``validation`` rows out.

    Args:
        std: latents are distributions, with a ``std`` beside their ``mean``.
        holes: shards are zeros that take no room on the disk, to measure what there is to do per row beside reading.
    """
    ids = np.random.default_rng(0).integers(0, 256, (rows, 32), np.uint8)
    moments = ("mean", "std") if std else ("mean",)
    row_bytes = len(moments) * 2 * math.prod(SHAPE)
    images, texts = (shard_ranges(ids, size, TENSORS) for size in (row_bytes, 2 * DIM))
    for cache in ("latents", "text"):
        (folder / cache).mkdir(parents=True, exist_ok=True)

    def write(path: Path, places: range, tensors: Callable[[], dict[str, np.ndarray]]) -> None:
        if holes:
            _write_holes(path, {name: (len(places), *shape) for name, shape in shapes[path.parent.name].items()})
        else:
            own = {name: torch.from_numpy(tensor) for name, tensor in tensors().items()}
            save_shard(path, own, to_hex(ids[places.start : places.stop]).to_pylist())

    shapes = {"latents": dict.fromkeys(moments, SHAPE), "text": {"embedding": (DIM,)}}

    def place(number: int, places: range) -> dict[str, Any]:
        own, size = to_hex(ids[places.start : places.stop]), len(places)
        means = np.random.default_rng(number).normal(0, 0.1, size).astype(np.float32)
        columns = {"id": own, "key": own, "shard": [f"{number:05d}.safetensors"] * size}
        columns |= {"row": np.arange(size, dtype=np.int32), "mean": means}
        return columns | {"std": np.ones(size, np.float32), "finite": np.ones(size, bool)}

    def latents_index() -> Iterator[pa.Table]:
        for number, places in enumerate(images):
            path, size = folder / "latents" / f"{number:05d}.safetensors", len(places)
            write(path, places, lambda places=places: dict(zip(moments, _moments(places), strict=False)))
            columns = place(number, places) | {"source": ["synthetic"] * size}
            columns["split"] = np.where(np.asarray(places) < rows - validation, "train", "validation")
            columns |= {name: np.ones(size, np.float32) for name in ("abs_max", "weight")}
            sizes = zip(("channels", "height", "width"), SHAPE, strict=True)
            yield _table(latents.SCHEMA, columns | {name: np.full(size, own, np.int32) for name, own in sizes})

    def pairs() -> Iterator[pa.Table]:
        for places in images:
            own = to_hex(ids[places.start : places.stop])
            positions = np.zeros(len(places), np.int32)
            yield _table(captions.PAIR_COLUMNS, {"image_id": own, "caption_id": own, "position": positions})

    def text_index() -> Iterator[pa.Table]:
        for number, places in enumerate(texts):
            path, size = folder / "text" / f"{number:05d}.safetensors", len(places)
            write(path, places, lambda places=places: {"embedding": synthetic(places)[1]})
            columns = place(number, places) | {"text": [f"caption {row}" for row in places]}
            norms = np.random.default_rng((number, 1)).normal(DIM**0.5, 1, size)  # these tell captions apart, too
            columns |= {"norm": norms.astype(np.float32), "dim": np.full(size, DIM, np.int32)}
            yield _table(captions.SCHEMA, columns | {"tokens": np.full(size, 6, np.int32)})

    write_table(folder / "latents/index.parquet", latents.SCHEMA, latents_index())
    write_table(folder / "text/pairs.parquet", captions.PAIR_COLUMNS, pairs())
    write_table(folder / "text/index.parquet", captions.SCHEMA, text_index())
    made_by = {"reference": "bundled", "class": "Synthetic", "fingerprint": "0" * 64}
    statistics = {"format_version": FORMAT_VERSION, "flip": False, "mean": [0.0] * SHAPE[0], "std": [1.0] * SHAPE[0]}
    statistics |= {"bound": 3.0, "vae": made_by, "attribution": "", "licence": ""}
    write_json(folder / "latents" / "stats.json", statistics)
    read = {"dim": DIM, "token_dim": None, "max_tokens": 77}
    write_json(folder / "text" / "stats.json", {"format_version": FORMAT_VERSION, "encoder": made_by} | read)


def _table(schema: pa.Schema, columns: dict[str, Any]) -> pa.Table:
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def _moments(places: range) -> tuple[np.ndarray, np.ndarray]:
    means, _ = synthetic(places)
    return means, np.abs(means[::-1])


def _write_holes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A shard of fp16 zeros, of which the file system stores the header alone."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


def memory() -> dict[str, float]:
    """This process's memory in MiB: VmHWM (the peak), RssAnon, RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) / 1024
        for name, value in (line.split(":", 1) for line in lines)
        if name in ("VmHWM", "RssAnon", "RssFile")
    }
