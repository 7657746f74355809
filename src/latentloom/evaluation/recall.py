"""Whether a sample is the image that its caption belongs to: the nearest of all latents says.

Distances are root mean squares of differences, between standardised latents. Latents of another shape than a sample's
are resized to it. A caption that several images have is right with any of them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from latentloom.encoding.codec import batches_by_shape
from latentloom.encoding.dataset import Captions, LatentDataset, Split

PART = 8192  # latents compared at a time


def nearest(
    samples: Sequence[torch.Tensor], splits: Sequence[LatentDataset | Split], count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` images nearest to each sample (C, h, w) among all of ``splits``; all, where there are fewer.

    Only `PART` latents are in memory at a time.

    Returns:
        Numbers of images (B, count), counted through the splits one after the other, the nearest first; of two equally
        near, the first. And their distances (B, count). Both on the CPU.
    """
    places = list(batches_by_shape([sample.shape for sample in samples], len(samples)))
    searches = [_Search(torch.stack([samples[place] for place in own]), count) for own in places]
    start = 0
    for bucket in (bucket for split in splits for bucket in split.buckets):
        for part, latents in bucket.parts(PART):
            for search in searches:
                search.add(latents, start + part.start)
        start += len(bucket)
    found = (len(samples), min(count, start))
    rows, distances = torch.empty(found, dtype=torch.long), torch.empty(found)
    for own, search in zip(places, searches, strict=True):
        rows[own], distances[own] = search.rows.cpu(), search.distances.cpu()
    return rows, distances


class _Search:
    """The ``count`` latents nearest to each of ``samples`` (B, C, h, w), of those that were added."""

    def __init__(self, samples: torch.Tensor, count: int) -> None:
        self.queries, self.size, self.count = samples.flatten(1).float(), samples.shape[2:], count
        self.distances = self.queries.new_empty(len(samples), 0)
        self.rows = torch.empty(len(samples), 0, dtype=torch.long, device=samples.device)

    def add(self, latents: torch.Tensor, first: int) -> None:
        """Compare with ``latents`` (N, C, h, w) of any size, numbered from ``first`` on."""
        if latents.shape[2:] != self.size:
            latents = interpolate(latents, tuple(self.size), mode="bilinear", antialias=True)
        added = torch.cdist(self.queries, latents.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        added /= math.sqrt(self.queries.shape[1])
        numbers = torch.arange(first, first + len(latents), device=self.rows.device)
        distances, order = torch.cat([self.distances, added], 1).sort(dim=1, stable=True)
        rows = torch.cat([self.rows, numbers.expand(len(self.rows), -1)], 1).gather(1, order[:, : self.count])
        self.rows, self.distances = rows, distances[:, : self.count]


def recalled(rows: torch.Tensor, splits: Sequence[LatentDataset | Split], captions: torch.Tensor) -> np.ndarray:
    """Which samples (B), bool, have an image of their caption among those nearest to them.

    Args:
        rows: of the nearest images (B, k), as `nearest` numbers them.
        splits: with a common table of captions.
        captions: the samples' captions, as rows of that table (B).
    """
    captions_of = Captions.concatenate([split.captions for split in splits])
    places, own = captions_of[rows.flatten()].flat()  # the nearest images' captions
    samples = places // max(rows.shape[1], 1)
    right = torch.zeros(len(rows), dtype=torch.bool)
    right[samples[own == captions.cpu()[samples]]] = True
    return right.numpy()


def memorisation_recall(
    samples: Sequence[torch.Tensor], known: LatentDataset | Split, train: LatentDataset | Split
) -> np.ndarray:
    """Of samples of the captions of training images ``known``, which are nearest to an image of their caption (B)."""
    return recalled(nearest(samples, [train])[0], [train], known.captions.primary)


def with_interval(name: str, hits: np.ndarray) -> dict[str, float]:
    """The share of ``hits`` (B), bool, and its 95 % Wilson interval: ``name``, ``name_low``, ``name_high``.

    Of no samples there is no share, and the figures are left out.
    """
    from scipy.stats import binomtest

    if not len(hits):
        return {}
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    figures = {name: hits.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: round(float(value), 4) for key, value in figures.items()}
