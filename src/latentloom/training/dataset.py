"""The training data on the device: standardised latents and caption embeddings, read once from the caches.

    data/latents  -> z0 = (raw - mean) / std per channel, (N, C, h, w)
    data/text     -> embeddings (M, dim); each image names its captions by row

A batch is then an index: no loader, no copy from the host.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.captions import read_captions
from latentloom.encoding.latents import read_latents

BY_IMAGE = ("mean", "std", "flipped_mean", "flipped_std", "captions", "caption_counts")  # tensors on the device


@dataclass(frozen=True)
class LatentDataset:
    """Latents with their captions, on one device.

    Attributes:
        ids: the images' ids.
        mean: standardised latents, or the means of their distributions (N, C, h, w), fp32.
        std: the distributions' standard deviations in the same units, or None for a deterministic VAE.
        embeddings: caption embeddings (M, dim), fp32.
        texts: the captions (M).
        captions: for each image the rows of its captions in ``embeddings`` (N, K), the primary one first; short lists
            are filled by repeating from the start, so a uniform draw of a column below ``caption_counts`` is fair.
        caption_counts: captions an image (N).
        weights: how often each image is drawn, relative to the others (N), float64, on the CPU; None: all alike.
        flipped_mean: as ``mean``, of the mirrored images; None where they were not encoded.
        flipped_std: as ``std``, of the mirrored images.
    """

    ids: list[str]
    mean: torch.Tensor
    std: torch.Tensor | None
    embeddings: torch.Tensor
    texts: list[str]
    captions: torch.Tensor
    caption_counts: torch.Tensor
    weights: torch.Tensor | None = None
    flipped_mean: torch.Tensor | None = None
    flipped_std: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return tuple(self.mean.shape[1:])

    def primary_texts(self) -> list[str]:
        """Each image's primary caption."""
        return [self.texts[row] for row in self.captions[:, 0].tolist()]

    def primary_embeddings(self) -> torch.Tensor:
        """The embedding of each image's primary caption (N, dim)."""
        return self.embeddings[self.captions[:, 0]]

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
        """The same data on ``device``."""
        moved = {
            name: tensor.to(device) for name in (*BY_IMAGE, "embeddings") if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def take(self, count: int) -> "LatentDataset":
        """The first ``count`` images."""
        names = (*BY_IMAGE, "weights")
        taken = {name: tensor[:count] for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, ids=self.ids[:count], **taken)


@dataclass(frozen=True)
class Caches:
    """Both splits, and what made the caches (the two ``stats.json``)."""

    train: LatentDataset
    validation: LatentDataset
    latent_statistics: dict
    text_statistics: dict

    def to(self, device: torch.device) -> "Caches":
        """The same data on ``device``."""
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))


def load_caches(latents: Path, text: Path) -> Caches:
    """Read both caches into memory as training and validation sets, each ordered by id.

    Ordering by id makes a run independent of the order of files in the source.

    Raises:
        ValueError: when a file is missing or damaged, an image has no caption, or the training split is empty.
    """
    index, tensors, latent_statistics = read_latents(latents)
    text_index, pairs, embeddings, text_statistics = read_captions(text)
    center = torch.tensor(latent_statistics["mean"], dtype=torch.float32).view(1, -1, 1, 1)
    scale = torch.tensor(latent_statistics["std"], dtype=torch.float32).view(1, -1, 1, 1)
    weights = torch.from_numpy(index["weight"].to_numpy(np.float64))
    captions, counts = _caption_table(index["id"], pairs, text_index["id"])
    texts, embeddings = text_index["text"].tolist(), embeddings.float()

    def standardised(name: str, rows: torch.Tensor) -> torch.Tensor:
        values = tensors[name][rows].float()
        return (values.sub_(center) if name.endswith("mean") else values).div_(scale)

    def split(name: str) -> LatentDataset:
        chosen = index[index["split"] == name].sort_values("id").index.to_numpy(copy=True)
        rows = torch.from_numpy(chosen)
        return LatentDataset(
            ids=index["id"].iloc[chosen].tolist(),
            embeddings=embeddings,
            texts=texts,
            captions=captions[rows],
            caption_counts=counts[rows],
            weights=None if weights.unique().numel() == 1 else weights[rows],
            **{"std": None} | {name: standardised(name, rows) for name in tensors},
        )

    train = split("train")
    if not len(train):
        raise ValueError(f"{latents} has no training image: add images, or lower ingest.val_fraction")
    return Caches(train, split("validation"), latent_statistics, text_statistics)


def _caption_table(
    image_ids: pd.Series, pairs: pd.DataFrame, caption_ids: pd.Series
) -> tuple[torch.Tensor, torch.Tensor]:
    ordered = pairs.sort_values(["image_id", "position"])
    caption_rows = pd.Index(caption_ids).get_indexer(ordered["caption_id"])
    if (caption_rows < 0).any():
        unknown = ordered["caption_id"].iloc[int(np.argmin(caption_rows))]
        raise ValueError(f"data/text/pairs.parquet names a caption that has no embedding: {unknown}; run `dvc repro`")
    by_image = ordered.groupby("image_id")["position"].size()
    counts = by_image.reindex(image_ids).fillna(0).to_numpy(np.int64, copy=True)
    if not counts.all():
        missing = image_ids[counts == 0]
        raise ValueError(
            f"{len(missing)} images have no caption in the text cache, the first: {missing.iloc[0]}; run `dvc repro`"
        )
    firsts = (by_image.cumsum() - by_image).reindex(image_ids).to_numpy(np.int64)
    table = caption_rows[firsts[:, None] + np.arange(counts.max(initial=1)) % counts[:, None]]
    return torch.from_numpy(table), torch.from_numpy(counts)
