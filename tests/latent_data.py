"""Small data sets, in memory and as caches on the disk; and a cache read by other tools than the package's own."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from latentloom.encoding.cache import FORMAT_VERSION, save_shard
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import LatentDataset, Split
from latentloom.encoding.image_captions import Captions, CaptionTexts
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.encoding.shard_files import TOKENS, ragged
from latentloom.files import read_json, write_json
from latentloom.ids import from_hex

SHARD_ROWS = 7


class Texts(CaptionTexts):
    """Captions in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def parts(self, numbers: np.ndarray | None = None) -> Iterator[list[str]]:
        yield self.texts if numbers is None else [self.texts[number] for number in numbers]


def captions_of(table: torch.Tensor, counts: torch.Tensor | None = None) -> Captions:
    """Of image i, the first ``counts[i]`` of row i of a table (N, K); all of them by default."""
    counts = torch.full((len(table),), table.shape[1]) if counts is None else counts
    return Captions(table.flatten().int(), torch.arange(len(table)) * table.shape[1], counts.int())


def ids_of(names: Sequence[str]) -> np.ndarray:
    """Ids as files have them, or made of shorter names, so that they sort as these do."""
    return from_hex([name if len(name) == 64 else name.encode().hex().ljust(64, "0") for name in names])


class TensorDataset(LatentDataset):
    """A data set of tensors that are standardised already, all on one device; and all of them at once."""

    @classmethod
    def from_tensors(
        cls,
        ids: list[str],
        mean: torch.Tensor,
        std: torch.Tensor | None,
        embeddings: torch.Tensor,
        texts: Sequence[str],
        captions: torch.Tensor,
        caption_counts: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        flipped_mean: torch.Tensor | None = None,
        flipped_std: torch.Tensor | None = None,
        token_states: Sequence[torch.Tensor] | None = None,
    ) -> "TensorDataset":
        views = {"mean": (mean, flipped_mean), "std": (std, flipped_std)}
        latents = {
            name: own if mirrored is None else torch.cat([own, mirrored])
            for name, (own, mirrored) in views.items()
            if own is not None
        }
        return cls(
            ids=ids_of(ids),
            latents=InMemoryRows(latents),
            codec=LatentCodec([0.0] * mean.shape[1], [1.0] * mean.shape[1]),
            text=InMemoryRows({"embedding": embeddings} | (ragged(token_states, TOKENS) if token_states else {})),
            texts=Texts(texts),
            captions=captions_of(captions, caption_counts),
            weights=weights,
            first_mirrored=None if flipped_mean is None else len(ids),
        )

    @property
    def mean(self) -> torch.Tensor:
        return self.latents_at(slice(0, len(self)))[0]

    @property
    def flipped_mean(self) -> torch.Tensor:
        return self.latents_at(slice(self.first_mirrored, self.first_mirrored + len(self)))[0]

    @property
    def embeddings(self) -> torch.Tensor:
        return self.embeddings_at(slice(0, len(self.texts)))


def read_cache(folder: Path) -> tuple[pd.DataFrame, dict[str, torch.Tensor], dict]:
    """A cache as (index, tensors in the index's order, statistics); mirrored latents are ``flipped_mean`` and so on."""
    index, tensors = pd.read_parquet(folder / "index.parquet"), {}
    for prefix, place in (("", folder), ("flipped_", folder / "flipped")):
        shards = {name: load_file(place / name) for name in index["shard"].unique() if place.is_dir()}
        rows = [(shards[shard], row) for shard, row in zip(index["shard"], index["row"], strict=True) if shards]
        for name in rows[0][0] if rows else ():
            tensors[prefix + name] = torch.stack([shard[name][row] for shard, row in rows])
    return index, tensors, read_json(folder / "stats.json")


@pytest.fixture
def make_data() -> Callable[..., TensorDataset]:
    """``make_data(rows)``: latents (rows, 4, 8, 8) with two captions each, the second shared by all.

    With ``flipped``, a mirrored latent is the latent mirrored, plus 100, and has no spread. With ``tokens``, captions
    have one to five token states (10,).
    """

    def make(
        rows: int, *, std: bool = False, flipped: bool = False, prefix: str = "image", tokens: bool = False
    ) -> TensorDataset:
        generator = torch.Generator().manual_seed(rows)
        mean = torch.randn(rows, 4, 8, 8, generator=generator)
        return TensorDataset.from_tensors(
            ids=[f"{prefix}{row}" for row in range(rows)],
            mean=mean,
            std=torch.full((rows, 4, 8, 8), 0.1) if std else None,
            embeddings=torch.randn(rows + 1, 12, generator=generator),
            texts=[*(f"caption {row}" for row in range(rows)), "shared"],
            captions=torch.tensor([[row, rows] for row in range(rows)]),
            flipped_mean=mean.flip(-1) + 100 if flipped else None,
            flipped_std=torch.zeros(rows, 4, 8, 8) if flipped and std else None,
            token_states=[torch.randn(1 + row % 5, 10, generator=generator) for row in range(rows + 1)]
            if tokens
            else None,
        )

    return make


def split_of_shapes(data: LatentDataset, *parts: tuple[int, tuple[int, int]]) -> Split:
    """So many images of each size (h, w), one after the other, of ``data``, whose latents are resized to it."""
    buckets, first = [], 0
    for count, size in parts:
        rows = slice(first, first + count)
        raw = data.latents.gather(rows)
        bucket = replace(
            data,
            ids=data.ids[rows],
            latents=InMemoryRows({name: F.interpolate(tensor, size) for name, tensor in raw.items()}),
            captions=data.captions[rows],
            weights=None if data.weights is None else data.weights[rows],
        )
        buckets.append(bucket)
        first += count
    return Split(tuple(buckets))


@pytest.fixture
def write_caches(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """``write_caches(rows)`` writes both caches of random latents (4, 8, 8), in shards of 7 rows; gives their folders.

    Images have one, two or three captions; every fifth image is of the validation split, of 20 rows at least 4. With
    ``tokens``, captions have one to nine token states (10,).
    """

    def write(
        rows: int, *, std: bool = True, flip: bool = True, weighted: bool = True, tokens: bool = False
    ) -> tuple[Path, Path]:
        random = np.random.default_rng(rows)
        ids = [hashlib.sha256(f"image {row}".encode()).hexdigest() for row in range(rows)]
        texts = [f"caption {row}" for row in range(2 * rows)]
        text_ids = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        latents, text = tmp_path / "latents", tmp_path / "text"

        def shards(folder: Path, keys: list[str], tokens: bool = False, **shapes: tuple[int, ...]) -> None:
            for start in range(0, len(keys), SHARD_ROWS):
                own = keys[start : start + SHARD_ROWS]
                tensors = {
                    name: torch.from_numpy(random.standard_normal((len(own), *shape), np.float32)).half()
                    for name, shape in shapes.items()
                }
                if tokens:
                    states = [random.standard_normal((random.integers(1, 10), 10), np.float32) for _ in own]
                    tensors |= ragged([torch.from_numpy(state).half() for state in states], TOKENS)
                save_shard(folder / f"{start // SHARD_ROWS:05d}.safetensors", tensors, own)

        def index(keys: list[str], **columns) -> pd.DataFrame:
            numbers = np.arange(len(keys))
            names = [f"{number:05d}.safetensors" for number in numbers // SHARD_ROWS]
            return pd.DataFrame({"id": keys, "shard": names, "row": (numbers % SHARD_ROWS).astype(np.int32)} | columns)

        moments = {"mean": (4, 8, 8)} | ({"std": (4, 8, 8)} if std else {})
        shards(latents, ids, **moments)
        if flip:
            shards(latents / "flipped", ids, **moments)
        shards(text, text_ids, tokens, embedding=(12,))
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
        statistics = {"mean": [0.5, -0.25, 0.0, 1.0], "std": [1.5, 0.75, 1.0, 3.0], "bound": 3.5, "flip": flip}
        write_json(latents / "stats.json", {"format_version": FORMAT_VERSION} | statistics)
        read = {"dim": 12, "token_dim": 10 if tokens else None, "max_tokens": 9}
        write_json(text / "stats.json", {"format_version": FORMAT_VERSION} | read)
        return latents, text

    return write
