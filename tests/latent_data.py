"""Small data sets, in memory and as caches on the disk, and params to train on them in seconds."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from latentloom.encoding.dataset import LatentDataset
from latentloom.encoding.rows import FORMAT_VERSION
from latentloom.encoding.tensor_shards import save_shard
from latentloom.files import write_json

SHARD_ROWS = 7


@pytest.fixture
def make_data() -> Callable[..., LatentDataset]:
    """``make_data(rows)``: latents (rows, 4, 8, 8) with two captions each, the second shared by all.

    With ``flipped``, a mirrored latent is the latent mirrored, plus 100, and has no spread.
    """

    def make(rows: int, *, std: bool = False, flipped: bool = False, prefix: str = "image") -> LatentDataset:
        generator = torch.Generator().manual_seed(rows)
        mean = torch.randn(rows, 4, 8, 8, generator=generator)
        return LatentDataset.from_tensors(
            ids=[f"{prefix}{row}" for row in range(rows)],
            mean=mean,
            std=torch.full((rows, 4, 8, 8), 0.1) if std else None,
            embeddings=torch.randn(rows + 1, 12, generator=generator),
            texts=[*(f"caption {row}" for row in range(rows)), "shared"],
            captions=torch.tensor([[row, rows] for row in range(rows)]),
            caption_counts=torch.full((rows,), 2),
            flipped_mean=mean.flip(-1) + 100 if flipped else None,
            flipped_std=torch.zeros(rows, 4, 8, 8) if flipped and std else None,
        )

    return make


@pytest.fixture
def write_caches(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``write_caches(rows)`` writes both caches of random latents (4, 8, 8), in shards of 7 rows; gives their folders.

    Images have one, two or three captions; every fifth image is of the validation split, of 20 rows at least 4.
    """

    def write(rows: int, *, std: bool = True, flip: bool = True, weighted: bool = True) -> tuple[Path, Path]:
        random = np.random.default_rng(rows)
        ids = [hashlib.sha256(f"image {row}".encode()).hexdigest() for row in range(rows)]
        texts = [f"caption {row}" for row in range(2 * rows)]
        text_ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        latents, text = tmp_path / "latents", tmp_path / "text"

        def shards(folder: Path, keys: list[str], **shapes: tuple[int, ...]) -> None:
            for start in range(0, len(keys), SHARD_ROWS):
                own = keys[start : start + SHARD_ROWS]
                tensors = {
                    name: torch.from_numpy(random.standard_normal((len(own), *shape), np.float32)).half()
                    for name, shape in shapes.items()
                }
                save_shard(folder / f"{start // SHARD_ROWS:05d}.safetensors", tensors, own)

        def index(keys: list[str], **columns) -> pd.DataFrame:
            numbers = np.arange(len(keys))
            names = [f"{number:05d}.safetensors" for number in numbers // SHARD_ROWS]
            return pd.DataFrame({"id": keys, "shard": names, "row": (numbers % SHARD_ROWS).astype(np.int32)} | columns)

        moments = {"mean": (4, 8, 8)} | ({"std": (4, 8, 8)} if std else {})
        shards(latents, ids, **moments)
        if flip:
            shards(latents / "flipped", ids, **moments)
        shards(text, text_ids, embedding=(12,))
        split = np.where(np.arange(rows) % 5 == 4, "validation", "train")
        weight = np.where(np.arange(rows) % 3 == 0, 2.0 if weighted else 1.0, 1.0).astype(np.float32)
        index(ids, split=split, weight=weight).to_parquet(latents / "index.parquet")
        index(text_ids, text=texts).to_parquet(text / "index.parquet")
        pairs = [
            (own, text_ids[(2 * row + position) % len(texts)], position)
            for row, own in enumerate(ids)
            for position in range(1 + row % 3)
        ]
        pd.DataFrame(pairs, columns=["image_id", "caption_id", "position"]).to_parquet(text / "pairs.parquet")
        statistics = {"mean": [0.5, -0.25, 0.0, 1.0], "std": [1.5, 0.75, 1.0, 3.0], "flip": flip}
        write_json(latents / "stats.json", {"format_version": FORMAT_VERSION} | statistics)
        write_json(text / "stats.json", {"format_version": FORMAT_VERSION, "dim": 12})
        return latents, text

    return write
