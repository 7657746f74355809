"""Whether a sample is the image that its caption belongs to: the nearest of all latents says.

Distances are Euclidean, between standardised latents. A caption that several images have is right with any of them.
"""

from collections.abc import Sequence

import numpy as np
import torch

from latentloom.encoding.dataset import LatentDataset

PART = 8192  # latents compared at a time


def nearest(
    samples: torch.Tensor, datasets: Sequence[LatentDataset], count: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` images nearest to each sample (B, C, h, w) among all of ``datasets``; all, where there are fewer.

    Only `PART` latents are in memory at a time.

    Returns:
        Numbers of images (B, count), counted through the data sets one after the other, the nearest first; of two
        equally near, the first. And their distances (B, count). Both on the CPU.
    """
    queries, exact = samples.flatten(1).float(), "donot_use_mm_for_euclid_dist"
    distances = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    start = 0
    for data in datasets:
        for part, latents in data.parts(PART):
            added = torch.cdist(queries, latents.flatten(1), compute_mode=exact)
            numbers = torch.arange(start + part.start, start + part.stop, device=rows.device)
            distances, order = torch.cat([distances, added], 1).sort(dim=1, stable=True)
            rows = torch.cat([rows, numbers.expand(len(rows), -1)], 1).gather(1, order[:, :count])
            distances = distances[:, :count]
        start += len(data)
    return rows.cpu(), distances.cpu()


def recalled(rows: torch.Tensor, datasets: Sequence[LatentDataset], captions: torch.Tensor) -> np.ndarray:
    """Which samples (B), bool, have an image of their caption among those nearest to them.

    Args:
        rows: of the nearest images (B, k), as `nearest` numbers them.
        datasets: with a common table of captions.
        captions: the samples' captions, as rows of that table (B).
    """
    captions_of = torch.cat([data.captions.cpu() for data in datasets])  # (N, K)
    own = captions_of[rows]  # (B, k, K)
    return (own == captions.cpu()[:, None, None]).any(-1).any(-1).numpy()


def memorisation_recall(samples: torch.Tensor, known: LatentDataset, train: LatentDataset) -> np.ndarray:
    """Of samples of the captions of training images ``known``, which are nearest to an image of their caption (B)."""
    return recalled(nearest(samples, [train])[0], [train], known.captions[:, 0])


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
