"""The latent cache: prepared images -> VAE latents.

    data/images/*.parquet -> data/latents/NNNNN.safetensors   raw VAE output, fp16: `mean` (and `std`) (N, C, h, w)
                             data/latents/index.parquet       one row an image: where its latent lies, scalar statistics
                             data/latents/stats.json          what made it; statistics a channel, training split only

Scaling is not applied here, so another scaling never invalidates the cache.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from latentloom.encoding.rows import FORMAT_VERSION, RowStore, Tensors, load_rows, row_key, write_shards
from latentloom.encoding.vae import Vae
from latentloom.files import atomic_path, read_json, write_json
from latentloom.ingestion.shards import iterate_images, read_manifest, read_metadata

BATCH_SIZE = 32
PREPROCESSING = "uint8/127.5-1"
DTYPES = "float32->float16"


@dataclass(frozen=True)
class EncodeCounts:
    """How many rows a stage wrote, and how many of them it had to compute."""

    rows: int
    encoded: int
    reused: int


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


def encode_images(vae: Vae, images: Path, out: Path, state: Path) -> EncodeCounts:
    """Encode every prepared image into ``out``; rows that the row store in ``state`` knows are not computed again.

    Args:
        vae: the VAE to encode with.
        images: the folder that the ingest stage wrote.
        out: the folder for the cache.
        state: the folder of the row store, kept between runs.
    """
    metadata = read_metadata(images)
    manifest = read_manifest(images)
    ids = metadata["id"].tolist()
    keys = [row_key(image_id, vae.fingerprint, PREPROCESSING, DTYPES) for image_id in ids]
    is_train = torch.from_numpy((metadata["split"] == "train").to_numpy(copy=True))
    progress = tqdm(total=len(ids), desc="encode_images", unit="image")

    def compute(positions: Sequence[int]) -> Tensors:
        return _encode(vae, images, {ids[position] for position in positions}, progress)

    statistics = ChannelStatistics()
    frames, encoded, shape = [], 0, None
    for shard in write_shards(out, RowStore(state), keys, compute):
        part = slice(shard.positions.start, shard.positions.stop)
        frames.append(_index(metadata.iloc[part], keys[part], shard.path.name, shard.tensors["mean"]))
        statistics.add({name: tensor[is_train[part]] for name, tensor in shard.tensors.items()})
        encoded += shard.computed
        shape = list(shard.tensors["mean"].shape[1:])
        progress.update(len(shard.positions) - shard.computed)
    progress.close()
    if shape is None:
        raise ValueError(f"{images} holds no images: run `dvc repro ingest`")
    with atomic_path(out / "index.parquet") as temporary:
        pd.concat(frames, ignore_index=True).to_parquet(temporary, index=False)
    mean, std = statistics.result()
    write_json(
        out / "stats.json",
        {
            "format_version": FORMAT_VERSION,
            "vae": {"reference": vae.reference, "class": vae.class_name, "fingerprint": vae.fingerprint},
            "distribution": vae.distribution,
            "latent_shape": shape,
            "rows": len(ids),
            "train_rows": int(is_train.sum()),
            "mean": mean,
            "std": std,
            "attribution": manifest["attribution"],
            "licence": manifest["licence"],
        },
    )
    return EncodeCounts(len(ids), encoded, len(ids) - encoded)


def read_latents(folder: Path) -> tuple[pd.DataFrame, Tensors, dict]:
    """The cache as (index, tensors in the index's order, statistics).

    Raises:
        ValueError: when a file is missing or damaged, naming it.
    """
    statistics = read_json(folder / "stats.json")
    try:
        index = pd.read_parquet(folder / "index.parquet")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'index.parquet'} is missing or damaged ({error}); delete it and run `dvc repro`"
        ) from error
    return index, load_rows(folder, index["shard"].tolist(), index["row"].to_numpy()), statistics


def _encode(vae: Vae, images: Path, wanted: set[str], progress: tqdm) -> Tensors:
    """Encode the images of ``wanted``, in the order they are stored; the next batch is decoded while one is encoded."""
    parts: list[Tensors] = []
    with ThreadPoolExecutor(1) as reader:
        batches = _batches(images, wanted)
        following = reader.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = reader.submit(next, batches, None)
            # Always the same batch size: a row's bytes must not depend on how many others are encoded with it.
            filled = np.concatenate([batch, np.repeat(batch[-1:], BATCH_SIZE - len(batch), axis=0)])
            parts.append({name: tensor[: len(batch)].half() for name, tensor in vae.encode(filled).items()})
            progress.update(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _batches(images: Path, wanted: set[str]):
    batch = []
    for _, pixels in iterate_images(images, wanted=wanted):
        batch.append(pixels)
        if len(batch) == BATCH_SIZE:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _index(metadata: pd.DataFrame, keys: list[str], shard: str, latents: torch.Tensor) -> pd.DataFrame:
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
            "finite": values.isfinite().all(1).numpy(),
        }
    )
    return frame.assign(channels=np.int32(channels), height=np.int32(height), width=np.int32(width))
