"""Figures of all training latents, taken in parts, so that any number of them fits into memory.

Mean and standard deviation per channel are of the raw latents, and say how to standardise them. The bound is of the
standardised ones, and says how far they reach.
"""

from collections.abc import Iterable

import numpy as np
import torch

from latentloom.diffusion.noise import quantile
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.shard_files import Tensors
from latentloom.errors import UserError

BOUND_PERCENTILE = 0.995
BOUND_SHARE = 0.99
VALUES_AT_ONCE = 2**22


class ChannelStatistics:
    """Mean and standard deviation per channel of all latents seen, in one pass and in float64 (Chan, Golub & LeVeque
    1983).

    Of a latent given by moments, the statistics are those of its samples: Var = Var(mean) + E[std^2].
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: torch.Tensor | float = 0.0
        self._squares: torch.Tensor | float = 0.0

    def add(self, tensors: Tensors) -> None:
        """Take in latents (N, C, h, w)."""
        values = tensors["mean"].double().transpose(0, 1).flatten(1)
        size = values.shape[1]
        if not size:
            return
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        if "std" in tensors:
            squares = squares + tensors["std"].double().square().sum((0, 2, 3))
        total = self.count + size
        difference = mean - self._mean
        self._squares = self._squares + squares + difference.square() * (self.count * size / total)
        self._mean = self._mean + difference * (size / total)
        self.count = total

    def result(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, one number per channel each.

        Raises:
            UserError: when no latent was seen.
        """
        if not self.count:
            raise UserError("the training split is empty: add images, or lower ingest.val_fraction")
        return self._mean.tolist(), (self._squares / self.count).sqrt().tolist()


def latent_bound(codec: LatentCodec, raw_means: Iterable[torch.Tensor]) -> float:
    """The bound of dynamic thresholding: 99 % of the latents have their 99.5th percentile of |z| below it.

    Imagen's bound of 1 presumes data in [-1, 1] (Saharia et al. 2022, section 2.3); standardised latents reach further.

    Args:
        codec: standardises.
        raw_means: all training latents, or the means of their distributions, in parts (N, C, h, w).
    """
    percentiles = [
        quantile(codec.standardise(part).flatten(1).abs(), BOUND_PERCENTILE)
        for means in raw_means
        for part in means.split(max(VALUES_AT_ONCE // means[0].numel(), 1))
    ]
    return round(float(np.quantile(torch.cat(percentiles).numpy(), BOUND_SHARE)), 4)
