"""The latent cache: prepared images -> VAE latents.

    data/images/*.parquet -> data/latents/NNNNN.safetensors   raw VAE output, fp16: `mean` (and `std`) (N, C, h, w)
                             data/latents/flipped/            with flip: the mirrored images' latents, the same rows
                             data/latents/index.parquet       one row per image: where its latent is, its statistics
                             data/latents/rejects.parquet     images whose latent is not finite, left out of the index
                             data/latents/stats.json          what made it; figures of the training split, to
                                                              standardise latents and to bound them

Standardising is not applied here, so another scale never invalidates the cache.

A shard holds latents of one shape. Images of several sizes come size by size, in the manifest's order of sizes, and
within a size in the order in which they are stored.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from latentloom.encoding.cache import FORMAT_VERSION, Done, EncodeCounts, Plan, Shard, Task, row_keys
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.index_files import ROW_GROUP, STRING, shard_names, write_table
from latentloom.encoding.latent_statistics import (
    ChannelSums,
    channel_statistics,
    channel_sums,
    latent_bound,
    percentiles,
)
from latentloom.encoding.row_store import RowStore
from latentloom.encoding.shard_files import FLIPPED, INDEX, REJECTS, STATS, Tensors, load_shard
from latentloom.encoding.vae import Vae
from latentloom.engine import here, ordered_map, threaded_map, worker_count
from latentloom.errors import UserError
from latentloom.files import atomic_path, write_json
from latentloom.ids import ID_BYTES, from_hex, to_hex
from latentloom.ingestion.pngs import decode
from latentloom.ingestion.shards import NumberedImages, metadata_batches, prepared_sizes, read_manifest, sizes_of
from latentloom.sizes import Size

BATCH_SIZE = 32
DECODERS = 8  # threads at most: they decode 2 (128x128) to 6 times (256x256) as much as one; Python's lock limits them
PREPROCESSING = "uint8/127.5-1"
MIRRORED = "mirrored"
STORED = "float16"
NOT_FINITE = "latent_not_finite"

FIGURES = pa.schema(  # of each row, in the order of the shards
    [
        ("number", pa.int32()),  # of the shard
        ("row", pa.int32()),
        *((name, pa.float32()) for name in ("mean", "std", "abs_max")),
        ("finite", pa.bool_()),
        *((name, pa.int32()) for name in ("channels", "height", "width")),
    ]
)
SCHEMA = pa.schema(
    [
        *((name, STRING) for name in ("id", "key", "split", "shard")),
        *list(FIGURES)[1:],
        ("source", STRING),
        ("weight", pa.float32()),
    ]
)
REJECTED = pa.schema([(name, pa.string()) for name in ("id", "source", "key")])


def encode_images(vae: Vae, images: Path, out: Path, store: RowStore, *, flip: bool = False) -> EncodeCounts:
    """Encode every prepared image into ``out``, with ``flip`` its mirror image too; rows of ``store`` are not computed.

    The VAE is loaded when there is a row to compute.

    Raises:
        UserError: when there is no image, none in the training split with a latent that is finite, a size that the VAE
            cannot halve so often, or a file of ``images`` is damaged.
        WriteError: when the disk is full, naming the file.
    """
    (out / STATS).unlink(missing_ok=True)  # a folder without it is not finished
    manifest = read_manifest(images)
    if not manifest["images"]:
        raise UserError(f"{images} holds no images: run `dvc repro -f ingest`")
    for size in sizes_of(manifest):
        _check_size(vae, size)
    rows = ImageRows(images, manifest)
    views = {out: (), out / FLIPPED: (MIRRORED,)} if flip else {out: ()}
    if not flip:
        shutil.rmtree(out / FLIPPED, ignore_errors=True)
    plans, tables = [], []
    for folder, view in views.items():
        plans.append(plan_latents(vae, images, rows, folder, store, view))
        function = partial(make_shards, NumberedImages(images), bool(view))
        title = " ".join(["encode_images", *view])
        parts = plans[-1].run(function, encoder=vae, title=title, unit="image")
        tables.append(pa.concat_tables(parts).combine_chunks())
    store.trim()

    figures = tables[0]
    finite = np.logical_and.reduce([table["finite"].to_numpy() for table in tables])
    write_table(out / INDEX, SCHEMA, _index(rows, plans[0].keys, figures, finite, manifest["sources"]))
    rejects = _rejects(images, rows.number[~finite], vae.precision)
    with atomic_path(out / REJECTS) as temporary:
        rejects.to_parquet(temporary, index=False)
    train = rows.in_train & finite
    if not train.any() and len(rejects):
        raise UserError(
            f"no latent of the training split is finite, as computed by the VAE {vae.reference} in {vae.precision} and "
            "in fp32: choose another encode_images.vae"
        )
    if not train.any():
        raise UserError("the training split is empty: add images, or lower ingest.val_fraction")
    of_train = figures.select(["number", "row"]).filter(train)
    parts = [part for folder in views for part in _parts(folder, of_train)]
    mean, std = channel_statistics(ordered_map(_sums, parts))
    codec = LatentCodec(mean, std)
    bound = latent_bound(ordered_map(partial(_percentiles, codec), _parts(out, of_train)))
    write_json(
        out / STATS,
        {
            "format_version": FORMAT_VERSION,
            "vae": {"reference": vae.reference, "class": vae.class_name, "fingerprint": vae.fingerprint},
            "precision": vae.precision,
            "distribution": vae.distribution,
            "flip": flip,
            **_shapes(figures.filter(finite), train[finite], int(np.min(manifest["image_size"])) // vae.factor),
            "rows": int(finite.sum()),
            "rejected": len(rejects),
            "train_rows": int(train.sum()),
            "mean": mean,
            "std": std,
            "bound": bound,
            "attribution": manifest["attribution"],
            "licence": manifest["licence"],
        },
    )
    return EncodeCounts(len(rows.ids) * len(views), sum(plan.computed for plan in plans), len(rejects))


class ImageRows:
    """What is kept in memory of each image, in the order of the latents: size by size, as they are stored.

    Attributes:
        number: among the images (N,).
        ids: uint8 (N, 32).
        in_train: whether it is of the training split (N,).
        source, size: their numbers in the manifest (N,).
        pixels: how many it has (N,).
    """

    def __init__(self, images: Path, manifest: dict[str, Any]) -> None:
        sizes, sources = list(sizes_of(manifest)), [source["name"] for source in manifest["sources"]]
        count, start = manifest["images"], 0
        self.ids, self.in_train = np.empty((count, ID_BYTES), np.uint8), np.empty(count, bool)
        self.number, self.source, self.size = np.arange(count), np.empty(count, np.int16), np.zeros(count, np.int16)
        for batch in metadata_batches(images, ["id", "split", "source"]):
            own = slice(start, start := start + len(batch))
            self.ids[own] = from_hex(batch["id"])
            self.in_train[own] = pc.equal(batch["split"], "train")
            self.source[own] = pc.index_in(batch["source"], pa.array(sources))
        if len(sizes) > 1:
            of_images = prepared_sizes(images)
            for number, size in enumerate(sizes):
                self.size[(of_images == size).all(axis=1)] = number
            self.number = np.argsort(self.size, kind="stable")
            for name in ("ids", "in_train", "source", "size"):
                setattr(self, name, getattr(self, name)[self.number])
        self.pixels = np.array([size.width * size.height for size in sizes], np.int32)[self.size]


def plan_latents(
    vae: Vae, images: Path, rows: ImageRows, out: Path, store: RowStore, view: tuple[str, ...] = ()
) -> Plan:
    """Where the latents of all images come from; ``view`` is `MIRRORED`, or nothing."""
    keys = row_keys(rows.ids, vae.fingerprint, PREPROCESSING, f"{vae.precision}->{STORED}", *view)
    inputs = NumberedImages(images).files
    row_bytes = vae.latent_bytes(rows.pixels)
    return Plan(store, out, rows.ids, keys, row_bytes, rows.number, groups=rows.size, inputs=inputs)


def make_shards(images: NumberedImages, mirrored: bool, vae: Vae, task: Task) -> Done:
    """Make the shards of a task, and give the `FIGURES` of their rows."""
    batches = _encode(vae, images, task.made_of[task.link()], mirrored=mirrored)
    figures = pa.concat_tables([_figures(shard) for shard in task.write(batches)])
    return Done(task.computed, figures)


def _check_size(vae: Vae, size: Size) -> None:
    """Latents are whole numbers of rows and columns: of other sizes the VAE would drop the rest, and pictures come out
    smaller than they went in.
    """
    if not any(side % vae.factor for side in size):
        return
    made = f"the VAE {vae.reference} makes latents {vae.factor} times smaller, into which"
    if size.width != size.height:
        raise UserError(
            f"images of {size}: {made} that does not divide; set ingest.bucket_multiple to a multiple of {vae.factor}"
        )
    low = size.width // vae.factor * vae.factor
    raise UserError(
        f"ingest.image_size = {size.width}: {made} {size.width} does not divide; set "
        f"{' or '.join(str(own) for own in (low, low + vae.factor) if own)}"
    )


def _shapes(figures: pa.Table, in_train: np.ndarray, base: int) -> dict[str, list]:
    """``latent_shape``, of a sample that no size is asked of, and of several shapes all with their rows.

    That is the square of the base size, ``base`` rows high; where it was never trained on, the shape of most training
    images.
    """
    of_rows = np.stack([figures[name].to_numpy() for name in ("channels", "height", "width")], axis=1)
    # The rows come shape by shape.
    starts = np.flatnonzero((of_rows != np.roll(of_rows, 1, axis=0)).any(axis=1)) if len(of_rows) > 1 else []
    starts = np.union1d([0], starts).astype(int)
    shapes, counts = of_rows[starts].tolist(), np.diff(starts, append=len(of_rows)).tolist()
    trained = np.add.reduceat(in_train.astype(np.int64), starts)
    squares = [shape for shape, own in zip(shapes, trained, strict=True) if own and shape[1:] == [base, base]]
    shown = {"latent_shape": squares[0] if squares else shapes[int(trained.argmax())]}
    if len(shapes) > 1:
        shown["latent_shapes"] = [[*shape, count] for shape, count in zip(shapes, counts, strict=True)]
    return shown


@dataclass(frozen=True)
class _ShardRows:
    """Some rows of a shard."""

    path: Path
    rows: np.ndarray

    @property
    def reads(self) -> list[Path]:
        return [self.path]

    def load(self) -> Tensors:
        rows = self.rows.copy()  # torch wants arrays that can be written
        return {name: tensor[rows] for name, tensor in load_shard(here(self.path)).items()}


def _parts(folder: Path, figures: pa.Table) -> list[_ShardRows]:
    """The rows of `FIGURES`, shard by shard."""
    numbers, rows = (figures[name].to_numpy() for name in ("number", "row"))
    shards, starts = np.unique(numbers, return_index=True)
    paths = [folder / name for name in shard_names(pa.array(shards)).to_pylist()]
    return [_ShardRows(path, own) for path, own in zip(paths, np.split(rows, starts[1:]), strict=True)]


def _sums(part: _ShardRows) -> ChannelSums:
    return channel_sums(part.load())


def _percentiles(codec: LatentCodec, part: _ShardRows) -> np.ndarray:
    return percentiles(codec, part.load()["mean"])


def _encode(vae: Vae, images: NumberedImages, numbers: np.ndarray, *, mirrored: bool) -> Iterator[Tensors]:
    """Encode images, in this order; while a batch is encoded, the next is put together, and that after it decoded."""
    if not len(numbers):
        return
    decoders, pngs = min(worker_count(), DECODERS), images.pngs(numbers, here)
    # One core gains nothing by threads that decode, and each costs it a hundredth: there the reader does.
    decoded = map(decode, pngs) if decoders == 1 else threaded_map(decode, pngs, decoders, window=BATCH_SIZE)
    batches = _batches(decoded)
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next, batches, None)
        while (pixels := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield _encode_batch(vae, pixels[:, :, ::-1] if mirrored else pixels, vae.precision)


def _batches(images: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Images, (H, W, 3), in batches of one size."""
    for _, of_size in groupby(images, key=lambda pixels: pixels.shape):
        while batch := list(islice(of_size, BATCH_SIZE)):
            yield np.stack(batch)


def _encode_batch(vae: Vae, images: np.ndarray, precision: str) -> Tensors:
    """Encode at most ``BATCH_SIZE`` images (B, H, W, 3); rows that are not finite once more, in fp32."""
    # Always the same batch size: a row's bytes must not depend on how many others are encoded with it.
    filled = np.concatenate([images, np.repeat(images[-1:], BATCH_SIZE - len(images), axis=0)])
    encoded = vae.encode(filled, precision=precision)
    tensors = {name: tensor[: len(images)].half() for name, tensor in encoded.items()}
    overflown = (~_finite(tensors)).numpy()
    if overflown.any() and precision != "fp32":
        for name, tensor in _encode_batch(vae, images[overflown], "fp32").items():
            tensors[name][torch.from_numpy(overflown)] = tensor
    return tensors


def _finite(tensors: Tensors) -> torch.Tensor:
    """Which rows (N) are free of NaN and infinity in all tensors."""
    return torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in tensors.values()]).all(0)


def _figures(shard: Shard) -> pa.Table:
    values = shard.tensors["mean"].float()
    rows, *shape = values.shape
    values = values.flatten(1)
    columns = {
        "number": np.full(rows, shard.number),
        "row": np.arange(rows),
        "mean": values.mean(1).numpy(),
        "std": values.std(1, correction=0).numpy(),
        "abs_max": values.abs().amax(1).numpy(),
        "finite": _finite(shard.tensors).numpy(),
    }
    shapes = {name: np.full(rows, size) for name, size in zip(("channels", "height", "width"), shape, strict=True)}
    return pa.table(columns | shapes, FIGURES)


def _index(
    rows: ImageRows, keys: np.ndarray, figures: pa.Table, finite: np.ndarray, sources: list[dict[str, Any]]
) -> Iterator[pa.Table]:
    """The index, in parts: of the rows that are finite."""
    names = pa.array([source["name"] for source in sources])
    weights = np.array([source["weight"] for source in sources], np.float32)
    for start in range(0, len(figures), ROW_GROUP):
        own = start + np.flatnonzero(finite[start : start + ROW_GROUP])
        part = figures.take(own)
        columns = {name: part[name] for name in part.column_names if name != "number"} | {
            "id": to_hex(rows.ids[own]),
            "key": to_hex(keys[own]),
            "split": np.where(rows.in_train[own], "train", "validation"),
            "shard": shard_names(part["number"]),
            "finite": finite[own],
            "source": names.take(pa.array(rows.source[own])),
            "weight": weights[rows.source[own]],
        }
        yield pa.table({name: columns[name] for name in SCHEMA.names}).cast(SCHEMA)


def _rejects(images: Path, numbers: np.ndarray, precision: str) -> pd.DataFrame:
    """The images of these numbers, in this order."""
    tried = "fp32" if precision == "fp32" else f"{precision} and in fp32"
    detail = f"its latent (computed in {tried}, stored in {STORED}) is not finite: look at the image, or change the VAE"
    parts, start = [REJECTED.empty_table()], 0
    for batch in metadata_batches(images, REJECTED.names) if len(numbers) else ():
        own = numbers[(numbers >= start) & (numbers < start + len(batch))] - start
        parts.append(pa.Table.from_batches([batch]).take(np.sort(own)))
        start += len(batch)
    in_order = np.searchsorted(np.sort(numbers), numbers)
    columns = pa.concat_tables(parts).take(in_order).to_pydict()
    return pd.DataFrame(columns | {"reason": NOT_FINITE, "detail": detail}, index=range(len(numbers)), dtype="str")
