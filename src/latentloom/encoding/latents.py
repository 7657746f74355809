"""The latent cache: prepared images -> VAE latents.

    data/images/*.parquet -> data/latents/NNNNN.safetensors   raw VAE output, fp16: `mean` (and `std`) (N, C, h, w)
                             data/latents/flipped/            with flip: the mirrored images' latents, the same rows
                             data/latents/index.parquet       one row an image: where its latent lies, scalar statistics
                             data/latents/rejects.parquet     images whose latent is not finite, left out of the index
                             data/latents/stats.json          what made it; statistics a channel, training split only

Scaling is not applied here, so another scaling never invalidates the cache.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from latentloom.encoding.row_store import RowStore
from latentloom.encoding.rows import FORMAT_VERSION, load_rows, row_key, write_shards
from latentloom.encoding.tensor_shards import Tensors
from latentloom.encoding.vae import Vae
from latentloom.files import atomic_path, read_json, write_json
from latentloom.ingestion.shards import iterate_images, read_manifest, read_metadata

BATCH_SIZE = 32
PREPROCESSING = "uint8/127.5-1"
MIRRORED = "mirrored"
STORED = "float16"
FLIPPED = "flipped"
STATS = "stats.json"
NOT_FINITE = "latent_not_finite"


@dataclass(frozen=True)
class EncodeCounts:
    """How many rows a stage wrote, how many of them it had to compute, and how many images or captions it refused."""

    rows: int
    encoded: int
    rejected: int = 0

    @property
    def reused(self) -> int:
        """Rows that an earlier run had computed."""
        return self.rows - self.encoded


class ChannelStatistics:
    """Mean and standard deviation a channel of all latents seen, in one pass (Chan, Golub & LeVeque 1983), in float64.

    Of a latent given by moments, the statistics are those of its samples: Var = Var(mean) + E[std^2].
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, tensors: Tensors) -> None:
        """Take in latents (N, C, h, w)."""
        values = tensors["mean"].double().transpose(0, 1).flatten(1)
        size = values.shape[1]
        if not size:
            return
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        if "std" in tensors:
            squares = squares + tensors["std"].double().square().sum((0, 2, 3))
        total = self.count + size
        difference = mean - self._mean
        self._squares = self._squares + squares + difference.square() * (self.count * size / total)
        self._mean = self._mean + difference * (size / total)
        self.count = total

    def result(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, one number a channel each."""
        if not self.count:
            raise ValueError("the training split is empty: add images, or lower ingest.val_fraction")
        return self._mean.tolist(), (self._squares / self.count).sqrt().tolist()


def encode_images(vae: Vae, images: Path, out: Path, store: RowStore, *, flip: bool = False) -> EncodeCounts:
    """Encode every prepared image into ``out``; rows that ``store`` knows are not computed again.

    Args:
        vae: the VAE to encode with.
        images: the folder that the ingest stage wrote.
        out: the folder for the cache.
        store: rows of earlier runs.
        flip: encode the mirrored images as well.

    Raises:
        ValueError: when there is no image, none in the training split, or a file of ``images`` is damaged.
        OSError: when the disk is full, naming the file.
    """
    (out / STATS).unlink(missing_ok=True)  # a folder without it is not finished
    metadata, manifest = read_metadata(images), read_manifest(images)
    ids = metadata["id"].tolist()
    if not ids:
        raise ValueError(f"{images} holds no images: run `dvc repro -f ingest`")
    progress = tqdm(total=len(ids) * (1 + flip), desc="encode_images", unit="image")

    def write(folder: Path, keys: list[str], mirrored: bool):
        def compute(positions: Sequence[int]) -> Iterator[Tensors]:
            return _encode(vae, images, {ids[position] for position in positions}, mirrored, progress)

        return write_shards(folder, store, ids, keys, compute)

    made_by = (vae.fingerprint, PREPROCESSING, f"{vae.precision}->{STORED}")
    keys = [row_key(image_id, *made_by) for image_id in ids]
    views = [write(out, keys, False)]
    shutil.rmtree(out / FLIPPED, ignore_errors=True)
    if flip:
        views.append(write(out / FLIPPED, [row_key(image_id, *made_by, MIRRORED) for image_id in ids], True))
    is_train = torch.from_numpy((metadata["split"] == "train").to_numpy(copy=True))
    statistics, frames, encoded, shape = ChannelStatistics(), [], 0, None
    for shards in zip(*views, strict=True):
        shard = shards[0]
        part = slice(shard.positions.start, shard.positions.stop)
        finite = torch.stack([_finite(view.tensors) for view in shards]).all(0)
        frames.append(_index(metadata.iloc[part], keys[part], shard.path.name, shard.tensors["mean"], finite))
        for view in shards:
            statistics.add({name: tensor[is_train[part] & finite] for name, tensor in view.tensors.items()})
            encoded += view.computed
            progress.update(len(view.positions) - view.computed)
        shape = list(shard.tensors["mean"].shape[1:])
    progress.close()
    store.trim()

    weights = {source["name"]: source["weight"] for source in manifest["sources"]}
    index = pd.concat(frames, ignore_index=True).assign(source=metadata["source"].to_numpy())
    index["weight"] = index["source"].map(weights).astype(np.float32)
    rejects = _rejects(metadata[~index["finite"].to_numpy()], vae.precision)
    index = index[index["finite"]]
    for name, frame in (("index.parquet", index), ("rejects.parquet", rejects)):
        with atomic_path(out / name) as temporary:
            frame.to_parquet(temporary, index=False)
    mean, std = statistics.result()
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
            "train_rows": int((index["split"] == "train").sum()),
            "mean": mean,
            "std": std,
            "attribution": manifest["attribution"],
            "licence": manifest["licence"],
        },
    )
    return EncodeCounts(len(ids) * (1 + flip), encoded, len(rejects))


def read_latents(folder: Path) -> tuple[pd.DataFrame, Tensors, dict]:
    """The cache as (index, tensors in the index's order, statistics).

    Where the mirrored images were encoded too, their latents are ``flipped_mean`` (and ``flipped_std``).

    Raises:
        ValueError: when a file is missing or damaged, naming it.
    """
    statistics = read_json(folder / STATS)
    try:
        index = pd.read_parquet(folder / "index.parquet")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'index.parquet'} is missing or damaged ({error}); delete it and run `dvc repro`"
        ) from error
    shards, rows = index["shard"].tolist(), index["row"].to_numpy()
    tensors = load_rows(folder, shards, rows)
    if statistics["flip"]:
        flipped = load_rows(folder / FLIPPED, shards, rows)
        tensors |= {f"flipped_{name}": tensor for name, tensor in flipped.items()}
    return index, tensors, statistics


def _encode(vae: Vae, images: Path, wanted: set[str], mirrored: bool, progress: tqdm) -> Iterator[Tensors]:
    """Encode the images of ``wanted``, in the order they are stored; the next batch is decoded while one is encoded."""
    with ThreadPoolExecutor(1) as reader:
        batches = _batches(images, wanted)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            yield _encode_batch(vae, batch[:, :, ::-1] if mirrored else batch)
            progress.update(len(batch))


def _encode_batch(vae: Vae, images: np.ndarray) -> Tensors:
    """Encode at most ``BATCH_SIZE`` images (B, H, W, 3); rows that are not finite once more, in fp32."""
    # Always the same batch size: a row's bytes must not depend on how many others are encoded with it.
    filled = np.concatenate([images, np.repeat(images[-1:], BATCH_SIZE - len(images), axis=0)])
    tensors = {name: tensor[: len(images)].half() for name, tensor in vae.encode(filled).items()}
    overflown = (~_finite(tensors)).numpy()
    if overflown.any() and vae.precision != "fp32":
        again = _encode_batch(replace(vae, precision="fp32"), images[overflown])
        for name, tensor in again.items():
            tensors[name][torch.from_numpy(overflown)] = tensor
    return tensors


def _batches(images: Path, wanted: set[str]) -> Iterator[np.ndarray]:
    batch = []
    for _, pixels in iterate_images(images, wanted=wanted):
        batch.append(pixels)
        if len(batch) == BATCH_SIZE:
            yield np.stack(batch)
            batch = []
    if batch:
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
