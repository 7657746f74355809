"""Whether a sample is the image that its caption belongs to: the nearest of all training latents says."""

import numpy as np
import torch

from latentloom.encoding.dataset import LatentDataset

PART = 8192  # training latents compared at a time


def recall_at_1(samples: torch.Tensor, train: LatentDataset) -> float:
    """Of samples (B, C, h, w), the share whose nearest training latent, of all, is the one in their own row."""
    return float((nearest_rows(samples, train) == np.arange(len(samples))).mean())


def nearest_rows(samples: torch.Tensor, train: LatentDataset) -> np.ndarray:
    """For each sample (B, C, h, w) the row of the closest latent of ``train``, by Euclidean distance."""
    queries, exact = samples.flatten(1).float(), "donot_use_mm_for_euclid_dist"
    best = torch.full((len(samples),), torch.inf, device=samples.device)
    rows = torch.zeros(len(samples), dtype=torch.long, device=samples.device)
    for part, latents in train.parts(PART):
        distance, row = torch.cdist(queries, latents.flatten(1), compute_mode=exact).min(1)
        rows = torch.where(distance < best, row + part.start, rows)
        best = torch.minimum(best, distance)
    return rows.cpu().numpy()
