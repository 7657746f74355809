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
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.cache import FORMAT_VERSION, EncodeCounts, Plan, RowStore, Shard, row_key
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.latent_statistics import channel_statistics, latent_bound
from latentloom.encoding.shard_files import FLIPPED, INDEX, REJECTS, STATS, Tensors, load_shard
from latentloom.encoding.vae import Vae
from latentloom.errors import UserError
from latentloom.files import atomic_path, write_json
from latentloom.ingestion.shards import iterate_images, prepared_sizes, read_manifest, read_metadata, sizes_of
from latentloom.sizes import Size

BATCH_SIZE = 32
PREPROCESSING = "uint8/127.5-1"
MIRRORED = "mirrored"
STORED = "float16"
NOT_FINITE = "latent_not_finite"


def encode_images(vae: Vae, images: Path, out: Path, store: RowStore, *, flip: bool = False) -> EncodeCounts:
    """Encode every prepared image into ``out``, with ``flip`` its mirror image too; rows of ``store`` are not computed.

    The VAE is loaded when there is a row to compute.

    Raises:
        UserError: when there is no image, none in the training split with a latent that is finite, a size that the VAE
            cannot halve so often, or a file of ``images`` is damaged.
        WriteError: when the disk is full, naming the file.
    """
    (out / STATS).unlink(missing_ok=True)  # a folder without it is not finished
    metadata, manifest = read_metadata(images), read_manifest(images)
    if metadata.empty:
        raise UserError(f"{images} holds no images: run `dvc repro -f ingest`")
    sizes = list(sizes_of(manifest))
    for size in sizes:
        _check_size(vae, size)
    metadata["size"] = [sizes.index((width, height)) for width, height in prepared_sizes(images).tolist()]
    metadata = metadata.sort_values("size", kind="stable", ignore_index=True)
    ids = metadata["id"].tolist()
    made_by = (vae.fingerprint, PREPROCESSING, f"{vae.precision}->{STORED}")
    views = {out: (), out / FLIPPED: (MIRRORED,)} if flip else {out: ()}
    if not flip:
        shutil.rmtree(out / FLIPPED, ignore_errors=True)
    encoded, frames = 0, []
    for folder, view in views.items():
        keys = [row_key(image_id, *made_by, *view) for image_id in ids]
        plan = Plan(store, folder, ids, keys, metadata["size"].tolist())
        encoded += len(plan.missing)
        missing = metadata.iloc[plan.missing].groupby("size")["id"]
        batches = chain.from_iterable(_encode(vae, images, set(of_size), mirrored=bool(view)) for _, of_size in missing)
        shards = plan.write(batches, " ".join(["encode_images", *view]), "image")
        frames.append(pd.concat([_index(metadata[shard.rows], keys[shard.rows], shard) for shard in shards]))
    store.trim()

    index = frames[0]
    index["finite"] = np.logical_and.reduce([frame["finite"] for frame in frames])
    index["source"] = metadata["source"]
    weights = {source["name"]: source["weight"] for source in manifest["sources"]}
    index["weight"] = index["source"].map(weights).astype(np.float32)
    rejects = _rejects(metadata[~index["finite"]], vae.precision)
    index = index[index["finite"]]
    for name, frame in ((INDEX, index), (REJECTS, rejects)):
        with atomic_path(out / name) as temporary:
            frame.to_parquet(temporary, index=False)
    train = index[index["split"] == "train"]
    if train.empty and len(rejects):
        raise UserError(
            f"no latent of the training split is finite, as computed by the VAE {vae.reference} in {vae.precision} and "
            "in fp32: choose another encode_images.vae"
        )
    if train.empty:
        raise UserError("the training split is empty: add images, or lower ingest.val_fraction")
    mean, std = channel_statistics(rows for folder in views for rows in _rows(folder, train))
    bound = latent_bound(LatentCodec(mean, std), (rows["mean"] for rows in _rows(out, train)))
    write_json(
        out / STATS,
        {
            "format_version": FORMAT_VERSION,
            "vae": {"reference": vae.reference, "class": vae.class_name, "fingerprint": vae.fingerprint},
            "precision": vae.precision,
            "distribution": vae.distribution,
            "flip": flip,
            **_shapes(index, int(np.min(manifest["image_size"])) // vae.factor),
            "rows": len(index),
            "rejected": len(rejects),
            "train_rows": len(train),
            "mean": mean,
            "std": std,
            "bound": bound,
            "attribution": manifest["attribution"],
            "licence": manifest["licence"],
        },
    )
    return EncodeCounts(len(ids) * len(views), encoded, len(rejects))


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


def _shapes(index: pd.DataFrame, base: int) -> dict[str, list]:
    """``latent_shape``, of a sample that no size is asked of, and of several shapes all with their rows.

    That is the square of the base size, ``base`` rows high; where it was never trained on, the shape of most training
    images.
    """
    by_shape = ["channels", "height", "width"]
    in_train = index[index["split"] == "train"].groupby(by_shape, sort=False).size()
    squares = [shape for shape in in_train.index if shape[1:] == (base, base)]
    shapes = {"latent_shape": list(map(int, squares[0] if squares else in_train.idxmax()))}
    rows = index.groupby(by_shape, sort=False).size()
    if len(rows) > 1:
        shapes["latent_shapes"] = [[*map(int, shape), int(count)] for shape, count in rows.items()]
    return shapes


def _rows(folder: Path, index: pd.DataFrame) -> Iterator[Tensors]:
    """The tensors of the rows that an index names, a shard at a time."""
    for shard, rows in index.groupby("shard")["row"]:
        chosen = rows.to_numpy(copy=True)
        yield {name: tensor[chosen] for name, tensor in load_shard(folder / shard).items()}


def _encode(vae: Vae, images: Path, wanted: set[str], *, mirrored: bool) -> Iterator[Tensors]:
    """Encode the images of ``wanted``, in the order they are stored; the next batch is decoded while one is encoded."""
    if not wanted:
        return
    read = iterate_images(images, wanted=wanted)

    def next_batch() -> list[np.ndarray]:
        return [pixels for _, pixels in islice(read, BATCH_SIZE)]

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(next_batch)
        while batch := following.result():
            following = reader.submit(next_batch)
            pixels = np.stack(batch)
            yield _encode_batch(vae, pixels[:, :, ::-1] if mirrored else pixels, vae.precision)


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


def _index(metadata: pd.DataFrame, keys: list[str], shard: Shard) -> pd.DataFrame:
    values = shard.tensors["mean"].float()
    channels, height, width = values.shape[1:]
    values = values.flatten(1)
    columns = {
        "id": metadata["id"],
        "key": keys,
        "split": metadata["split"],
        "shard": shard.path.name,
        "row": np.arange(len(values), dtype=np.int32),
        "mean": values.mean(1).numpy(),
        "std": values.std(1, correction=0).numpy(),
        "abs_max": values.abs().amax(1).numpy(),
        "finite": _finite(shard.tensors).numpy(),
        "channels": np.int32(channels),
        "height": np.int32(height),
        "width": np.int32(width),
    }
    return pd.DataFrame(columns)


def _rejects(metadata: pd.DataFrame, precision: str) -> pd.DataFrame:
    tried = "fp32" if precision == "fp32" else f"{precision} and in fp32"
    detail = f"its latent (computed in {tried}, stored in {STORED}) is not finite: look at the image, or change the VAE"
    columns = {name: metadata[name].astype("str") for name in ("id", "source", "key")}
    return pd.DataFrame(columns | {"reason": NOT_FINITE, "detail": detail}, index=metadata.index, dtype="str")
