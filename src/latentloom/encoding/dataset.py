"""The training data: latents and caption embeddings as the caches hold them, standardised a batch at a time.

    data/latents  -> raw rows, fp16  -> z0 = (raw - mean) / std per channel, (B, C, h, w), fp32
    data/text     -> raw rows, fp16  -> embeddings (B, dim), fp32, and token states (B, T, token_dim) where there are
                                        any; each image names its captions by row

The raw rows are on the device, or streamed from the disk where they do not fit (`latentloom.encoding.row_sources`).
What is held for each of them beside is numbers in columns, no Python object: docs/scaling.md counts the bytes.

Latents of one shape are a `LatentDataset`. A split of several shapes is a `Split`: a data set of each. Whatever reads
splits goes over ``buckets``, which both have, so one shape needs no code of its own.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from latentloom import ids
from latentloom.diffusion.text import Labels, Text
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.free_memory import free_memory
from latentloom.encoding.image_captions import Captions, CaptionTexts, caption_rows, captions_of
from latentloom.encoding.row_sources import MASK, Rows, RowSource, StreamedRows
from latentloom.encoding.shard_files import FLIPPED, INDEX, PAIRS, STATS, TOKENS
from latentloom.errors import UserError
from latentloom.files import iterate_table, read_json, sha256_file, table_rows


@dataclass(frozen=True)
class LatentDataset:
    """Latents of one shape with their captions, for one device.

    Attributes:
        ids: the images' ids (N, 32), uint8, ascending.
        latents: raw latents; a row is ``mean``, and ``std`` unless the VAE is deterministic, (C, h, w) each.
        codec: standardises them.
        text: raw caption embeddings; a row is an ``embedding`` (dim,), and ``tokens`` (T, token_dim) where the cache
            holds token states.
        texts: the captions (M).
        captions: which rows of ``text`` are each image's.
        weights: how often each image is seen, relative to the others (N), float64, on the CPU; None: equally often.
        first_mirrored: the mirrored image of row i is row ``first_mirrored + i`` of ``latents``; None where they were
            not encoded.
        stored: the images in the order in which they are stored (N), and where each shard's images end there; None: in
            the order of their ids, in one shard.
    """

    ids: np.ndarray
    latents: RowSource
    codec: LatentCodec
    text: RowSource
    texts: CaptionTexts
    captions: Captions
    weights: torch.Tensor | None = None
    first_mirrored: int | None = None
    stored: tuple[torch.Tensor, torch.Tensor] | None = None

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

    def names(self, rows: Rows = slice(None)) -> list[str]:
        """The ids of some images as files have them, 64 hexadecimal digits each."""
        return ids.to_hex(self.ids[rows if isinstance(rows, slice) else rows.numpy()]).to_pylist()

    def primary_texts(self) -> list[str]:
        """Each image's primary caption."""
        return self.texts.at(self.captions.primary)

    def all_texts(self) -> Iterator[str]:
        """Every caption that an image has, once."""
        for part in self.texts.parts(self.captions.flat()[1].unique().numpy()):
            yield from part

    def primary_embeddings(self, rows: Rows = slice(None)) -> Labels:
        """The embedding of the primary caption of each of some images (B, dim), or a `Text` of them."""
        return self.embeddings_at(self.captions[rows].primary)

    def take(self, count: int) -> "LatentDataset":
        """The first ``count`` images."""
        return replace(
            self,
            ids=self.ids[:count],
            captions=self.captions[:count],
            weights=None if self.weights is None else self.weights[:count],
            stored=None,
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
    def ids(self) -> np.ndarray:
        """The images' ids (N, 32): ascending within a bucket."""
        return np.concatenate([bucket.ids for bucket in self.buckets])

    @property
    def captions(self) -> Captions:
        """As `LatentDataset.captions`."""
        return Captions.concatenate([bucket.captions for bucket in self.buckets])

    @property
    def text(self) -> RowSource:
        """Raw caption embeddings."""
        return self.buckets[0].text

    @property
    def texts(self) -> CaptionTexts:
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

    names = LatentDataset.names
    primary_texts = LatentDataset.primary_texts
    all_texts = LatentDataset.all_texts
    primary_embeddings = LatentDataset.primary_embeddings

    def take(self, count: int) -> "Split":
        """The first ``count`` images by id, whatever their shapes."""
        firsts = [bucket.take(count) for bucket in self.buckets]
        bucket_of = np.repeat(np.arange(len(firsts)), list(map(len, firsts)))
        chosen = ids.ascending(np.concatenate([first.ids for first in firsts]))[:count]
        counts = np.bincount(bucket_of[chosen], minlength=len(firsts)).tolist()
        return Split(_without_empty([first.take(own) for first, own in zip(firsts, counts, strict=True)]))


def row_shapes(split: LatentDataset | Split) -> list[tuple[int, int, int]]:
    """The shape (C, h, w) of each image's latent (N)."""
    return [bucket.latent_shape for bucket in split.buckets for _ in range(len(bucket))]


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
    digests: Mapping[str, str] = field(default_factory=dict)  # 16 digits of a hash of each split, as encoded
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

    Ordering by id makes a run of up to ``train.block_rows`` images independent of the order of files in the source.
    Where the rows are changes no batch.

    Raw rows that need more than ``memory_share`` of the device's free memory are streamed from the disk; 0 streams
    always.

    Raises:
        UserError: when a file is missing or damaged, an image has no caption, or the training split is empty.
    """
    device = torch.device(device)
    latent_statistics, text_statistics = read_json(latents / STATS), read_json(text / STATS)
    texts = _Index.read(text / INDEX)
    rows_of_pairs = caption_rows(text / PAIRS, texts.ids)
    text_rows = StreamedRows([text], texts.names, texts.shards, texts.places, device)
    del texts  # ids are most of what opening takes: those of captions go before those of images come
    images = _Index.read(latents / INDEX, "latent_shapes" in latent_statistics)
    if not images.training.any():
        raise UserError(f"{latents} has no training image: add images, or lower ingest.val_fraction")
    captions = captions_of(images.ids, text / PAIRS, rows_of_pairs)

    views = [latents, latents / FLIPPED] if latent_statistics["flip"] else [latents]
    shapes = images.rows_of_shapes()
    latent_rows = [StreamedRows(views, images.names, images.shards[own], images.places[own], device) for own in shapes]
    needed, free = sum(own.nbytes for own in latent_rows) + text_rows.nbytes, free_memory(device)
    streamed = needed > memory_share * free
    embeddings = text_rows if streamed else text_rows.load()
    codec = LatentCodec(latent_statistics["mean"], latent_statistics["std"])
    weighted = len(images.weights) > 0 and bool((images.weights != images.weights[0]).any())

    def bucket(training: bool, shape: slice, of_shape: StreamedRows) -> LatentDataset:
        middle = shape.start + np.count_nonzero(images.training[shape])
        rows = slice(shape.start, middle) if training else slice(middle, shape.stop)
        own = of_shape.select(slice(rows.start - shape.start, rows.stop - shape.start))
        return LatentDataset(
            ids=images.ids[rows],
            latents=own if streamed else own.load(),
            codec=codec,
            text=embeddings,
            texts=CaptionTexts(text / INDEX),
            captions=captions[rows],
            weights=torch.from_numpy(images.weights[rows].astype(np.float64)) if weighted else None,
            first_mirrored=rows.stop - rows.start if latent_statistics["flip"] else None,
            stored=own.storage_order(),
        )

    def split(training: bool) -> LatentDataset | Split:
        own = _without_empty([bucket(training, *each) for each in zip(shapes, latent_rows, strict=True)])
        return own[0] if len(own) == 1 else Split(own)

    # Both files name ids, hashes of what they stand for.
    hashes = "|".join(sha256_file(path) for path in (latents / INDEX, text / PAIRS))
    return Caches(
        split(True),
        split(False),
        latent_statistics,
        text_statistics,
        {name: hashlib.sha256(f"{name}|{hashes}".encode()).hexdigest()[:16] for name in ("training", "validation")},
        f"{_size(needed)} of latents and embeddings are "
        + (f"streamed from the disk to {device}" if streamed else f"on {device}")
        + f": {_size(memory_share * free)} allowed, {memory_share:g} of the {_size(free)} free",
    )


def _without_empty(buckets: Sequence[LatentDataset]) -> tuple[LatentDataset, ...]:
    """Those with an image; the first where none has one."""
    return tuple(bucket for bucket in buckets if len(bucket)) or (buckets[0],)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class _Index:
    """What is needed of the index of a cache, a number per row and column.

    ``weights``, ``training`` and ``sizes`` (height and width) are of images; the last is empty where there is one.
    """

    ids: np.ndarray
    names: list[str]  # of the shards
    shards: np.ndarray
    places: np.ndarray
    training: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray

    @classmethod
    def read(cls, path: Path, several_shapes: bool | None = None) -> "_Index":
        """Read it in parts, so that no column of strings is whole in memory.

        Images come shape by shape, by rising height, then width; of a shape the training split comes first, and each
        split in the order of the ids. ``several_shapes`` is None of captions, which stay in the order of the index.
        """
        of_images = [] if several_shapes is None else ["split", "weight"]
        sizes = ["height", "width"] if several_shapes else []
        rows, names, first = table_rows(path), {}, 0
        columns = {
            "ids": np.empty((rows, ids.ID_BYTES), np.uint8),
            "shards": np.empty(rows, np.int32),
            "places": np.empty(rows, np.int32),
            "training": np.empty(rows if of_images else 0, bool),
            "weights": np.empty(rows if of_images else 0, np.float32),
            "sizes": np.empty((rows, len(sizes)), np.int32),
        }
        for table in iterate_table(path, ["id", "shard", "row", *of_images, *sizes]):
            part = slice(first, first := first + len(table))
            shards = table.column("shard").combine_chunks().dictionary_encode()
            codes = [names.setdefault(name, len(names)) for name in shards.dictionary.to_pylist()]
            columns["ids"][part] = ids.from_hex(table.column("id"))
            columns["shards"][part] = np.array(codes)[shards.indices.to_numpy(zero_copy_only=False)]
            columns["places"][part] = table.column("row").to_numpy()
            if of_images:
                columns["training"][part] = pc.equal(table.column("split"), "train").to_numpy()
                columns["weights"][part] = table.column("weight").to_numpy()
            for number, name in enumerate(sizes):
                columns["sizes"][part, number] = table.column(name).to_numpy()
        if of_images:
            order = ids.ascending(columns["ids"])
            height_first = columns["sizes"][order].T[::-1]
            order = order[np.lexsort((~columns["training"][order], *height_first))]
            for name in columns:  # one after the other, so that only one of them is there twice
                columns[name] = columns[name][order]
        return cls(names=list(names), **columns)

    def rows_of_shapes(self) -> list[slice]:
        """The rows of each shape."""
        is_other = (self.sizes[1:] != self.sizes[:-1]).any(axis=1)
        edges = [0, *(np.flatnonzero(is_other) + 1).tolist(), len(self.ids)]
        return [slice(*own) for own in pairwise(edges)]
