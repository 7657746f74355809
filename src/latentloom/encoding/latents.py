"""The latent cache: prepared images -> VAE latents.

    data/images/*.parquet -> data/latents/NNNNN.safetensors   raw VAE output, fp16: `mean` (and `std`) (N, C, h, w)
                             data/latents/flipped/            with flip: the mirrored images' latents, the same rows
                             data/latents/index.parquet       one row per image: where its latent is, its statistics
                             data/latents/rejects.parquet     images whose latent is not finite, left out of the index
                             data/latents/stats.json          what made it; figures of the training split, to
                                                              standardise latents and to bound them

Standardising is not applied here, so another scale never invalidates the cache.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from latentloom.encoding.cache import FORMAT_VERSION, EncodeCounts, Plan, RowStore, row_key
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.latent_statistics import ChannelStatistics, latent_bound
from latentloom.encoding.shard_files import FLIPPED, INDEX, REJECTS, STATS, Tensors, load_shard
from latentloom.encoding.vae import Vae
from latentloom.errors import UserError
from latentloom.files import atomic_path, write_json
from latentloom.ingestion.shards import iterate_images, read_manifest, read_metadata

BATCH_SIZE = 32
PREPROCESSING = "uint8/127.5-1"
MIRRORED = "mirrored"
STORED = "float16"
NOT_FINITE = "latent_not_finite"


def encode_images(vae: Vae, images: Path, out: Path, store: RowStore, *, flip: bool = False) -> EncodeCounts:
    """Encode every prepared image into ``out``; rows that ``store`` knows are not computed again.

    Args:
        vae: the VAE to encode with; it is loaded when there is a row to compute.
        images: the folder that the ingest stage wrote.
        out: the folder for the cache.
        store: rows of earlier runs.
        flip: encode the mirrored images as well.

    Raises:
        UserError: when there is no image, none in the training split, or a file of ``images`` is damaged.
        WriteError: when the disk is full, naming the file.
    """
    (out / STATS).unlink(missing_ok=True)  # a folder without it is not finished
    metadata, manifest = read_metadata(images), read_manifest(images)
    ids = metadata["id"].tolist()
    if not ids:
        raise UserError(f"{images} holds no images: run `dvc repro -f ingest`")
    made_by = (vae.fingerprint, PREPROCESSING, f"{vae.precision}->{STORED}")
    keys = [row_key(image_id, *made_by) for image_id in ids]
    plans = [Plan(store, out, ids, keys)]
    if flip:
        mirrored_keys = [row_key(image_id, *made_by, MIRRORED) for image_id in ids]
        plans.append(Plan(store, out / FLIPPED, ids, mirrored_keys))
    else:
        shutil.rmtree(out / FLIPPED, ignore_errors=True)
    rows, encoded = len(ids) * len(plans), sum(len(plan.missing) for plan in plans)
    is_train = torch.from_numpy((metadata["split"] == "train").to_numpy(copy=True))
    statistics, frames, shape = ChannelStatistics(), [], None
    with tqdm(total=rows, initial=rows - encoded, desc="encode_images", unit="image") as progress:
        views = [
            plan.write(_encode(vae, images, {ids[position] for position in plan.missing}, mirrored, progress))
            for plan, mirrored in zip(plans, (False, True), strict=False)
        ]
        for shards in zip(*views, strict=True):
            shard = shards[0]
            part = slice(shard.positions.start, shard.positions.stop)
            finite = torch.stack([_finite(view.tensors) for view in shards]).all(0)
            frames.append(_index(metadata.iloc[part], keys[part], shard.path.name, shard.tensors["mean"], finite))
            for view in shards:
                statistics.add({name: tensor[is_train[part] & finite] for name, tensor in view.tensors.items()})
            shape = list(shard.tensors["mean"].shape[1:])
    store.trim()

    weights = {source["name"]: source["weight"] for source in manifest["sources"]}
    index = pd.concat(frames, ignore_index=True).assign(source=metadata["source"].to_numpy())
    index["weight"] = index["source"].map(weights).astype(np.float32)
    rejects = _rejects(metadata[~index["finite"].to_numpy()], vae.precision)
    index = index[index["finite"]]
    for name, frame in ((INDEX, index), (REJECTS, rejects)):
        with atomic_path(out / name) as temporary:
            frame.to_parquet(temporary, index=False)
    mean, std = statistics.result()
    train = index[index["split"] == "train"]
    write_json(
        out / STATS,
        {
            "format_version": FORMAT_VERSION,
            "vae": {"reference": vae.reference, "class": vae.class_name, "fingerprint": vae.fingerprint},
            "precision": vae.precision,
            "distribution": vae.distribution,
            "flip": flip,
            "latent_shape": shape,
            "rows": len(index),
            "rejected": len(rejects),
            "train_rows": len(train),
            "mean": mean,
            "std": std,
            "bound": latent_bound(LatentCodec(mean, std), _means(out, train)),
            "attribution": manifest["attribution"],
            "licence": manifest["licence"],
        },
    )
    return EncodeCounts(rows, encoded, len(rejects))


def _means(folder: Path, index: pd.DataFrame) -> Iterator[torch.Tensor]:
    """The latents that an index names, or the means of their distributions, a shard at a time."""
    for shard, rows in index.groupby("shard")["row"]:
        yield load_shard(folder / shard)["mean"][rows.to_numpy(copy=True)]


def _encode(vae: Vae, images: Path, wanted: set[str], mirrored: bool, progress: tqdm) -> Iterator[Tensors]:
    """Encode the images of ``wanted``, in the order they are stored; the next batch is decoded while one is encoded."""
    if not wanted:
        return
    with ThreadPoolExecutor(1) as reader:
        batches = _batches(images, wanted)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            tensors = _encode_batch(vae, batch[:, :, ::-1] if mirrored else batch, vae.precision)
            progress.update(len(batch))
            yield tensors


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


def _batches(images: Path, wanted: set[str]) -> Iterator[np.ndarray]:
    read = iterate_images(images, wanted=wanted)
    while batch := [pixels for _, pixels in islice(read, BATCH_SIZE)]:
        yield np.stack(batch)


def _finite(tensors: Tensors) -> torch.Tensor:
    """Which rows (N) are free of NaN and infinity in all tensors."""
    return torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in tensors.values()]).all(0)


def _index(
    metadata: pd.DataFrame, keys: list[str], shard: str, latents: torch.Tensor, finite: torch.Tensor
) -> pd.DataFrame:
    values = latents.float().flatten(1)
    channels, height, width = latents.shape[1:]
    frame = pd.DataFrame(
        {
            "id": metadata["id"].to_numpy(),
            "key": keys,
            "split": metadata["split"].to_numpy(),
            "shard": shard,
            "row": np.arange(len(latents), dtype=np.int32),
            "mean": values.mean(1).numpy(),
            "std": values.std(1, correction=0).numpy(),
            "abs_max": values.abs().amax(1).numpy(),
            "finite": finite.numpy(),
        }
    )
    return frame.assign(channels=np.int32(channels), height=np.int32(height), width=np.int32(width))


def _rejects(metadata: pd.DataFrame, precision: str) -> pd.DataFrame:
    tried = "fp32" if precision == "fp32" else f"{precision} and in fp32"
    detail = f"its latent (computed in {tried}, stored in {STORED}) is not finite: look at the image, or change the VAE"
    columns = {name: metadata[name].astype("str") for name in ("id", "source", "key")}
    return pd.DataFrame(columns | {"reason": NOT_FINITE, "detail": detail}, index=metadata.index, dtype="str")
