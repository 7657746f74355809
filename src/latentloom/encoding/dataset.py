"""The training data: latents and caption embeddings as the caches hold them, standardised a batch at a time.

    data/latents  -> raw rows, fp16  -> z0 = (raw - mean) / std per channel, (B, C, h, w), fp32
    data/text     -> raw rows, fp16  -> embeddings (B, dim), fp32, and token states (B, T, token_dim) where there are
                                        any; each image names its captions by row

The raw rows are on the device, or streamed from the disk where they do not fit (`latentloom.encoding.row_sources`).

Latents of one shape are a `LatentDataset`. A split of several shapes is a `Split`: a data set of each. Whatever reads
splits goes over ``buckets``, which both have, so one shape needs no code of its own.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.diffusion.text import Labels, Text
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.free_memory import free_memory
from latentloom.encoding.row_sources import MASK, Rows, RowSource, StreamedRows
from latentloom.encoding.shard_files import FLIPPED, INDEX, PAIRS, STATS, TOKENS
from latentloom.errors import UserError
from latentloom.files import read_json, read_table, sha256_file


@dataclass(frozen=True)
class LatentDataset:
    """Latents of one shape with their captions, for one device.

    Attributes:
        ids: the images' ids (N), ascending.
        latents: raw latents; a row is ``mean``, and ``std`` unless the VAE is deterministic, (C, h, w) each.
        codec: standardises them.
        text: raw caption embeddings; a row is an ``embedding`` (dim,), and ``tokens`` (T, token_dim) where the cache
            holds token states.
        texts: the captions (M).
        captions: for each image the rows of its captions in ``text`` (N, K), the primary one first; short lists
            are filled by repeating from the start, so a uniform choice of a column below ``caption_counts`` is fair.
        caption_counts: captions per image (N).
        weights: how often each image is seen, relative to the others (N), float64, on the CPU; None: equally often.
        first_mirrored: the mirrored image of row i is row ``first_mirrored + i`` of ``latents``; None where they were
            not encoded.
    """

    ids: list[str]
    latents: RowSource
    codec: LatentCodec
    text: RowSource
    texts: pd.Series
    captions: torch.Tensor
    caption_counts: torch.Tensor
    weights: torch.Tensor | None = None
    first_mirrored: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def buckets(self) -> tuple["LatentDataset", ...]:
        """Itself, as the one bucket of a split of one shape."""
        return (self,)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Its one shape, as `Split.shapes`."""
        return (self.latent_shape,)

    @property
    def device(self) -> torch.device:
        """Where batches go, and where the rows are unless they are streamed."""
        return self.latents.device

    @property
    def streamed(self) -> bool:
        """Whether rows stay on the disk until a batch asks for them."""
        return self.latents.streamed

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.latents.shapes["mean"]

    @property
    def has_std(self) -> bool:
        """Whether latents are distributions, to be sampled."""
        return "std" in self.latents.shapes

    def latents_at(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Standardised latents, or the means of their distributions, of ``rows`` of ``latents``, and the standard
        deviations in the same units: both (B, C, h, w), fp32; the latter is None for a deterministic VAE.
        """
        raw = self.latents.gather(rows)
        std = self.codec.standardise_std(raw["std"]) if "std" in raw else None
        return self.codec.standardise(raw["mean"]), std

    def embeddings_at(self, rows: Rows) -> Labels:
        """Caption embeddings (B, dim), fp32, of ``rows`` of ``text``; a `Text` where the cache holds token states."""
        raw = self.text.gather(rows)
        if TOKENS not in raw:
            return raw["embedding"].float()
        return Text(raw["embedding"].float(), raw[TOKENS].float(), raw[TOKENS + MASK])

    def parts(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, at most ``size`` at a time: which they are, and their ``mean`` (B, C, h, w)."""
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            yield part, self.latents_at(part)[0]

    def primary_texts(self) -> list[str]:
        """Each image's primary caption."""
        return self.texts.iloc[self.captions[:, 0].tolist()].tolist()

    def primary_embeddings(self) -> Labels:
        """The embedding of each image's primary caption (N, dim), or a `Text` of them."""
        return self.embeddings_at(self.captions[:, 0])

    def take(self, count: int) -> "LatentDataset":
        """The first ``count`` images."""
        return replace(
            self,
            ids=self.ids[:count],
            captions=self.captions[:count],
            caption_counts=self.caption_counts[:count],
            weights=None if self.weights is None else self.weights[:count],
        )


@dataclass(frozen=True)
class Split:
    """A split whose latents have several shapes. What has one value per image is of one bucket after the other.

    Attributes:
        buckets: a data set per shape, by rising height, then width; none is empty, unless it is the only one. They
            share their captions (``text``, ``texts``) and ``codec``.
    """

    buckets: tuple[LatentDataset, ...]

    def __len__(self) -> int:
        return sum(map(len, self.buckets))

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(C, h, w) of each bucket."""
        return tuple(bucket.latent_shape for bucket in self.buckets)

    @property
    def ids(self) -> list[str]:
        """The images' ids (N): ascending within a bucket."""
        return [own for bucket in self.buckets for own in bucket.ids]

    @property
    def captions(self) -> torch.Tensor:
        """As `LatentDataset.captions` (N, K)."""
        return torch.cat([bucket.captions for bucket in self.buckets])

    @property
    def caption_counts(self) -> torch.Tensor:
        """Captions per image (N)."""
        return torch.cat([bucket.caption_counts for bucket in self.buckets])

    @property
    def weights(self) -> torch.Tensor | None:
        """As `LatentDataset.weights` (N): of all buckets, or of none."""
        weights = [bucket.weights for bucket in self.buckets]
        return None if weights[0] is None else torch.cat(weights)

    @property
    def text(self) -> RowSource:
        """Raw caption embeddings."""
        return self.buckets[0].text

    @property
    def texts(self) -> pd.Series:
        """The captions (M)."""
        return self.buckets[0].texts

    @property
    def codec(self) -> LatentCodec:
        """Standardises the latents of all buckets alike."""
        return self.buckets[0].codec

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.buckets[0].device

    @property
    def streamed(self) -> bool:
        """Whether rows stay on the disk until a batch asks for them."""
        return self.buckets[0].streamed

    def embeddings_at(self, rows: Rows) -> Labels:
        """Caption embeddings of ``rows`` of ``text``, as `LatentDataset.embeddings_at`."""
        return self.buckets[0].embeddings_at(rows)

    def primary_texts(self) -> list[str]:
        """Each image's primary caption."""
        return [text for bucket in self.buckets for text in bucket.primary_texts()]

    def primary_embeddings(self) -> Labels:
        """The embedding of each image's primary caption (N, dim), or a `Text` of them."""
        return self.embeddings_at(self.captions[:, 0])

    def take(self, count: int) -> "Split":
        """The first ``count`` images by id, whatever their shapes."""
        firsts = [bucket.take(count) for bucket in self.buckets]
        chosen = set(sorted(own for first in firsts for own in first.ids)[:count])
        return Split(_without_empty([first.take(len(chosen.intersection(first.ids))) for first in firsts]))


def row_shapes(split: LatentDataset | Split) -> list[tuple[int, int, int]]:
    """The shape (C, h, w) of each image's latent (N)."""
    return [bucket.latent_shape for bucket in split.buckets for _ in bucket.ids]


def all_latents(split: LatentDataset | Split) -> list[torch.Tensor]:
    """Each image's standardised latent (C, h, w), or the mean of its distribution (N)."""
    return [latent for bucket in split.buckets for latent in bucket.latents_at(slice(0, len(bucket)))[0]]


@dataclass(frozen=True)
class Caches:
    """Both splits, and what made the caches."""

    train: LatentDataset | Split  # never empty
    validation: LatentDataset | Split  # may be empty; see `has_validation`
    latent_statistics: dict  # the ``stats.json`` of the latents
    text_statistics: dict  # that of the text cache
    digests: Mapping[str, str] = field(default_factory=dict)  # a hash of each split, its captions and encoders
    placement: str = ""  # a message: whether the rows are on the device or streamed, and why

    @property
    def has_validation(self) -> bool:
        """Whether any image is held out."""
        return len(self.validation) > 0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a sample that no size is asked of: a shape of the training split."""
        shapes = self.train.shapes
        return shapes[0] if len(shapes) == 1 else tuple(self.latent_statistics["latent_shape"])


def load_caches(latents: Path, text: Path, *, device: torch.device | str = "cpu", memory_share: float = 1.0) -> Caches:
    """Open the caches that `encode_images` and `encode_text` wrote as training and validation sets, ordered by id.

    Ordering by id makes a run independent of the order of files in the source. Where the rows are changes no batch.

    Raw rows that need more than ``memory_share`` of the device's free memory are streamed from the disk; 0 streams
    always.

    Raises:
        UserError: when a file is missing or damaged, an image has no caption, or the training split is empty.
    """
    device = torch.device(device)
    latent_statistics, text_statistics = read_json(latents / STATS), read_json(text / STATS)
    several_shapes = "latent_shapes" in latent_statistics
    columns = ["id", "split", "weight", "shard", "row", *(["height", "width"] if several_shapes else [])]
    index = read_table(latents / INDEX, columns).sort_values("id", ignore_index=True)
    text_index = read_table(text / INDEX, ["id", "text", "shard", "row"])
    pairs = read_table(text / PAIRS, ["image_id", "caption_id", "position"])
    captions, counts = _caption_table(index["id"], pairs, text_index["id"])
    del pairs  # the largest of the tables
    if not (index["split"] == "train").any():
        raise UserError(f"{latents} has no training image: add images, or lower ingest.val_fraction")

    views = [latents, latents / FLIPPED] if latent_statistics["flip"] else [latents]
    rows_of_shape = index.groupby(["height", "width"]).indices if several_shapes else {(): np.arange(len(index))}
    buckets = [
        (rows, StreamedRows(views, index["shard"].iloc[rows], index["row"].iloc[rows], device))
        for _, rows in sorted(rows_of_shape.items())
    ]
    text_rows = StreamedRows([text], text_index["shard"], text_index["row"], device)
    needed, free = sum(latent_rows.nbytes for _, latent_rows in buckets) + text_rows.nbytes, free_memory(device)
    streamed = needed > memory_share * free
    embeddings = text_rows if streamed else text_rows.load()
    codec = LatentCodec(latent_statistics["mean"], latent_statistics["std"])
    weights = torch.from_numpy(index["weight"].to_numpy(np.float64))
    weighted = weights.unique().numel() > 1

    def bucket(name: str, rows: np.ndarray, latent_rows: StreamedRows) -> LatentDataset:
        inside = np.flatnonzero(index["split"].iloc[rows] == name)
        chosen = rows[inside]
        at = torch.from_numpy(chosen)
        own = latent_rows.select(np.concatenate([inside + len(rows) * view for view in range(len(views))]))
        return LatentDataset(
            ids=index["id"].iloc[chosen].tolist(),
            latents=own if streamed else own.load(),
            codec=codec,
            text=embeddings,
            texts=text_index["text"],
            captions=captions[at].to(device),
            caption_counts=counts[at].to(device),
            weights=weights[at] if weighted else None,
            first_mirrored=len(chosen) if latent_statistics["flip"] else None,
        )

    def split(name: str) -> LatentDataset | Split:
        own = _without_empty([bucket(name, *each) for each in buckets])
        return own[0] if len(own) == 1 else Split(own)

    return Caches(
        split("train"),
        split("validation"),
        latent_statistics,
        text_statistics,
        {name: _digest(name, latents / INDEX, text / PAIRS) for name in ("training", "validation")},
        f"{_size(needed)} of latents and embeddings are "
        + (f"streamed from the disk to {device}" if streamed else f"on {device}")
        + f": {_size(memory_share * free)} allowed, {memory_share:g} of the {_size(free)} free",
    )


def _without_empty(buckets: Sequence[LatentDataset]) -> tuple[LatentDataset, ...]:
    """Those with an image; the first where none has one."""
    return tuple(bucket for bucket in buckets if len(bucket)) or (buckets[0],)


def _digest(split: str, *files: Path) -> str:
    """A short hash of a split: 16 hexadecimal digits. The files name ids, which are hashes of what they stand for."""
    return hashlib.sha256("|".join([split, *map(sha256_file, files)]).encode()).hexdigest()[:16]


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _caption_table(
    image_ids: pd.Series, pairs: pd.DataFrame, caption_ids: pd.Series
) -> tuple[torch.Tensor, torch.Tensor]:
    """`LatentDataset.captions` and ``caption_counts``, of pairs in any order."""
    caption_rows = pd.Index(caption_ids).get_indexer(pairs["caption_id"])
    if (unknown := caption_rows < 0).any():
        first = pairs["caption_id"].iloc[int(np.argmax(unknown))]
        raise UserError(f"{PAIRS} of the text cache names a caption that has no embedding: {first}; run `dvc repro`")
    image_rows = pd.Index(image_ids).get_indexer(pairs["image_id"])  # -1: an image whose latent was rejected
    counts = np.bincount(image_rows[image_rows >= 0], minlength=len(image_ids))
    if not counts.all():
        missing = image_ids[counts == 0]
        raise UserError(
            f"{len(missing)} images have no caption in the text cache, the first: {missing.iloc[0]}; run `dvc repro`"
        )
    by_image = np.lexsort((pairs["position"], image_rows))[np.count_nonzero(image_rows < 0) :]
    firsts = counts.cumsum() - counts
    places = firsts[:, None] + np.arange(counts.max(initial=1)) % counts[:, None]
    return torch.from_numpy(caption_rows[by_image][places]), torch.from_numpy(counts)
