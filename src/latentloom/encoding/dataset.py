"""The training data: latents and caption embeddings as the caches hold them, standardised a batch at a time.

    data/latents  -> raw rows, fp16  -> z0 = (raw - mean) / std per channel, (B, C, h, w), fp32
    data/text     -> raw rows, fp16  -> embeddings (B, dim), fp32; each image names its captions by row

The raw rows lie on the device, or are streamed from the disk where they do not fit (`latentloom.encoding.row_sources`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.captions import STATS as TEXT_STATS
from latentloom.encoding.free_memory import free_memory
from latentloom.encoding.latents import FLIPPED
from latentloom.encoding.latents import STATS as LATENT_STATS
from latentloom.encoding.row_sources import HeldRows, RowPlaces, Rows, RowSource, StreamedRows
from latentloom.files import read_json


@dataclass(frozen=True)
class LatentDataset:
    """Latents with their captions, for one device.

    Attributes:
        ids: the images' ids (N).
        latents: raw latents; ``mean``, and ``std`` unless the VAE is deterministic, (C, h, w) a row.
        center: what standardising subtracts (1, C, 1, 1), fp32.
        scale: what standardising divides by (1, C, 1, 1), fp32.
        text: raw caption embeddings; ``embedding`` (dim,) a row.
        texts: the captions (M).
        captions: for each image the rows of its captions in ``text`` (N, K), the primary one first; short lists
            are filled by repeating from the start, so a uniform draw of a column below ``caption_counts`` is fair.
        caption_counts: captions an image (N).
        weights: how often each image is drawn, relative to the others (N), float64, on the CPU; None: all alike.
        first_mirrored: the mirrored image of row i is row ``first_mirrored + i`` of ``latents``; None where they were
            not encoded.
    """

    ids: list[str]
    latents: RowSource
    center: torch.Tensor
    scale: torch.Tensor
    text: RowSource
    texts: list[str]
    captions: torch.Tensor
    caption_counts: torch.Tensor
    weights: torch.Tensor | None = None
    first_mirrored: int | None = None

    @classmethod
    def from_tensors(
        cls,
        ids: list[str],
        mean: torch.Tensor,
        std: torch.Tensor | None,
        embeddings: torch.Tensor,
        texts: list[str],
        captions: torch.Tensor,
        caption_counts: torch.Tensor,
        weights: torch.Tensor | None = None,
        flipped_mean: torch.Tensor | None = None,
        flipped_std: torch.Tensor | None = None,
    ) -> "LatentDataset":
        """A set held by tensors that are standardised already, all on one device."""
        views = {"mean": (mean, flipped_mean), "std": (std, flipped_std)}
        shape = (1, mean.shape[1], 1, 1)
        return cls(
            ids=ids,
            latents=HeldRows(
                {
                    name: own if mirrored is None else torch.cat([own, mirrored])
                    for name, (own, mirrored) in views.items()
                    if own is not None
                }
            ),
            center=torch.zeros(shape, device=mean.device),
            scale=torch.ones(shape, device=mean.device),
            text=HeldRows({"embedding": embeddings}),
            texts=texts,
            captions=captions,
            caption_counts=caption_counts,
            weights=weights,
            first_mirrored=None if flipped_mean is None else len(ids),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        """Where batches go, and where the rows lie unless they are streamed."""
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
        """Standardised latents, or the means of their distributions, and the standard deviations in the same units.

        Args:
            rows: of ``latents`` (B,).

        Returns:
            Both (B, C, h, w), fp32, on the device; the second is None for a deterministic VAE.
        """
        raw = self.latents.gather(rows)
        std = raw["std"].float() / self.scale if "std" in raw else None
        return (raw["mean"].float() - self.center) / self.scale, std

    def embeddings_at(self, rows: Rows) -> torch.Tensor:
        """Caption embeddings (B, dim), fp32, of ``rows`` of ``text``."""
        return self.text.gather(rows)["embedding"].float()

    def parts(self, size: int, process: int = 0, processes: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, at most ``size`` at a time: which they are, and their ``mean`` (B, C, h, w).

        Of several processes, each gets every so many parts; together they get all.
        """
        for start in range(process * size, len(self), processes * size):
            part = slice(start, min(start + size, len(self)))
            yield part, self.latents_at(part)[0]

    # The whole set at once: for sets that fit into memory in fp32. `parts` and `latents_at` serve the others.

    @property
    def mean(self) -> torch.Tensor:
        """All standardised latents, or the means of their distributions (N, C, h, w), fp32."""
        return self.latents_at(slice(0, len(self)))[0]

    @property
    def std(self) -> torch.Tensor | None:
        """All standard deviations in the same units, or None for a deterministic VAE."""
        return self.latents_at(slice(0, len(self)))[1]

    @property
    def flipped_mean(self) -> torch.Tensor | None:
        """As ``mean``, of the mirrored images; None where they were not encoded."""
        return None if self.first_mirrored is None else self.latents_at(self._mirrored)[0]

    @property
    def flipped_std(self) -> torch.Tensor | None:
        """As ``std``, of the mirrored images."""
        return None if self.first_mirrored is None else self.latents_at(self._mirrored)[1]

    @property
    def embeddings(self) -> torch.Tensor:
        """All caption embeddings (M, dim), fp32."""
        return self.embeddings_at(slice(0, len(self.texts)))

    @property
    def _mirrored(self) -> slice:
        return slice(self.first_mirrored, self.first_mirrored + len(self))

    def primary_texts(self) -> list[str]:
        """Each image's primary caption."""
        return [self.texts[row] for row in self.captions[:, 0].tolist()]

    def primary_embeddings(self) -> torch.Tensor:
        """The embedding of each image's primary caption (N, dim)."""
        return self.embeddings_at(self.captions[:, 0])

    def table(self) -> pd.DataFrame:
        """The rows for a person or a data catalogue: image id and primary caption."""
        return pd.DataFrame({"id": self.ids, "caption": self.primary_texts()})

    def digest(self) -> str:
        """A short hash of which images with which captions these are: 16 hexadecimal digits."""
        rows = zip(self.ids, self.captions.tolist(), self.caption_counts.tolist(), strict=True)
        lines = (
            f"{own_id}:{'|'.join(self.texts[row] for row in captions[:count])}" for own_id, captions, count in rows
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def to(self, device: torch.device) -> "LatentDataset":
        """The same data for ``device``; what is streamed stays on the disk."""
        names = ("latents", "center", "scale", "text", "captions", "caption_counts")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

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
class Caches:
    """Both splits, and what made the caches (the two ``stats.json``).

    ``placement`` tells a person whether the rows lie on the device or are streamed, and why.
    """

    train: LatentDataset
    validation: LatentDataset
    latent_statistics: dict
    text_statistics: dict
    placement: str = ""

    @property
    def streamed(self) -> bool:
        """Whether rows stay on the disk until a batch asks for them."""
        return self.train.streamed

    def to(self, device: torch.device) -> "Caches":
        """The same data for ``device``."""
        train = self.train.to(device)
        return replace(self, train=train, validation=replace(self.validation.to(device), text=train.text))


def load_caches(latents: Path, text: Path, *, device: torch.device | str = "cpu", memory_share: float = 1.0) -> Caches:
    """Open both caches as training and validation sets, each ordered by id.

    Ordering by id makes a run independent of the order of files in the source. Where the rows lie changes no batch.

    Args:
        latents: the folder that the stage `encode_images` wrote.
        text: the folder that the stage `encode_text` wrote.
        device: where batches are needed.
        memory_share: raw rows that need more than this share of the device's free memory are streamed from the disk;
            0 streams always.

    Raises:
        ValueError: when a file is missing or damaged, an image has no caption, or the training split is empty.
    """
    device = torch.device(device)
    latent_statistics, text_statistics = read_json(latents / LATENT_STATS), read_json(text / TEXT_STATS)
    index = _read_table(latents / "index.parquet", ["id", "split", "weight", "shard", "row"])
    text_index = _read_table(text / "index.parquet", ["id", "text", "shard", "row"])
    pairs = _read_table(text / "pairs.parquet", ["image_id", "caption_id", "position"])
    captions, counts = _caption_table(index["id"], pairs, text_index["id"])
    del pairs  # the largest of the tables
    if not (index["split"] == "train").any():
        raise ValueError(f"{latents} has no training image: add images, or lower ingest.val_fraction")

    places = RowPlaces.of(latents, index["shard"], index["row"])
    mirrored = RowPlaces.of(latents / FLIPPED, index["shard"], index["row"]) if latent_statistics["flip"] else None
    text_places = RowPlaces.of(text, text_index["shard"], text_index["row"])
    needed = places.nbytes() * (1 if mirrored is None else 2) + text_places.nbytes()
    free = free_memory(device)
    streamed = needed > memory_share * free

    def source(of: RowPlaces) -> RowSource:
        return StreamedRows(of, device) if streamed else of.hold(device)

    weights = torch.from_numpy(index["weight"].to_numpy(np.float64))
    weighted = weights.unique().numel() > 1
    center, scale = (
        torch.tensor(latent_statistics[name], dtype=torch.float32, device=device).view(1, -1, 1, 1)
        for name in ("mean", "std")
    )
    embeddings, texts = source(text_places), text_index["text"].tolist()

    def split(name: str) -> LatentDataset:
        chosen = index.loc[index["split"] == name, "id"].sort_values().index.to_numpy(copy=True)
        rows = torch.from_numpy(chosen)
        return LatentDataset(
            ids=index["id"].iloc[chosen].tolist(),
            latents=source(places[chosen] if mirrored is None else places[chosen] + mirrored[chosen]),
            center=center,
            scale=scale,
            text=embeddings,
            texts=texts,
            captions=captions[rows].to(device),
            caption_counts=counts[rows].to(device),
            weights=weights[rows] if weighted else None,
            first_mirrored=None if mirrored is None else len(chosen),
        )

    return Caches(
        split("train"),
        split("validation"),
        latent_statistics,
        text_statistics,
        f"{_size(needed)} of latents and embeddings "
        + (f"are streamed from the disk to {device}" if streamed else f"lie on {device}")
        + f": {_size(memory_share * free)} allowed, {memory_share:g} of the {_size(free)} free",
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error


def _caption_table(
    image_ids: pd.Series, pairs: pd.DataFrame, caption_ids: pd.Series
) -> tuple[torch.Tensor, torch.Tensor]:
    caption_rows = pd.Index(caption_ids).get_indexer(pairs["caption_id"])
    if (unknown := caption_rows < 0).any():
        first = pairs["caption_id"].iloc[int(np.argmax(unknown))]
        raise ValueError(f"data/text/pairs.parquet names a caption that has no embedding: {first}; run `dvc repro`")
    image_rows = pd.Index(image_ids).get_indexer(pairs["image_id"])  # -1: an image whose latent was refused
    counts = np.bincount(image_rows[image_rows >= 0], minlength=len(image_ids))
    if not counts.all():
        missing = image_ids[counts == 0]
        raise ValueError(
            f"{len(missing)} images have no caption in the text cache, the first: {missing.iloc[0]}; run `dvc repro`"
        )
    by_image = np.lexsort((pairs["position"], image_rows))[np.count_nonzero(image_rows < 0) :]
    firsts = counts.cumsum() - counts
    places = firsts[:, None] + np.arange(counts.max(initial=1)) % counts[:, None]
    return torch.from_numpy(caption_rows[by_image][places]), torch.from_numpy(counts)
