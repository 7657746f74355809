"""How far standardised latents reach: the bound of dynamic thresholding, measured on the training split."""

import math

import numpy as np
import torch

from latentloom.encoding.dataset import LatentDataset

BOUND_PERCENTILE = 0.995
BOUND_SHARE = 0.99
NUMBERS_AT_ONCE = 2**22


def latent_bound(data: LatentDataset) -> float:
    """The bound for dynamic thresholding: 99 % of the latents have their 99.5th percentile of |z| below it.

    Imagen's bound of 1 presumes data in [-1, 1] (Saharia et al. 2022, section 2.3); standardised latents reach
    further. The rows are read in parts, so that any number of them fits.
    """
    size = max(NUMBERS_AT_ONCE // math.prod(data.latent_shape), 1)
    percentiles = torch.cat([quantile(mean.flatten(1).abs(), BOUND_PERCENTILE) for _, mean in data.parts(size)])
    return round(float(np.quantile(percentiles.cpu().numpy(), BOUND_SHARE)), 4)


def quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The quantile (N,) of each row of ``values`` (N, M), between order statistics as in `torch.quantile`.

    For a share near 1 it need not sort a row, and it takes any number of rows.
    """
    rank = share * (values.shape[1] - 1)
    below = math.floor(rank)
    largest = values.topk(values.shape[1] - below, dim=1).values
    return torch.lerp(largest[:, -1], largest[:, max(-2, -largest.shape[1])], rank - below)
