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

BOUND_PERCENTILE = 0.995
BOUND_SHARE = 0.99
ROWS_AT_ONCE = 256


def channel_statistics(parts: Iterable[Tensors]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of all latents, given in parts (N, C, h, w), fp16, of at least one row.

    Of latents given by moments, the statistics are those of their samples: Var = Var(mean) + E[std^2].

    Plain sums are enough: a square of fp16 has 22 bits, so float64 adds 2^31 equal ones exactly, and the std of a
    channel that never varies is 0.
    """
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for tensors in parts:
        values = tensors["mean"].double()
        count += values[:, 0].numel()
        total = total + values.sum((0, 2, 3))
        for tensor in tensors.values():
            squares = squares + tensor.double().square().sum((0, 2, 3))
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


def latent_bound(codec: LatentCodec, raw_means: Iterable[torch.Tensor]) -> float:
    """The bound of dynamic thresholding: 99 % of the latents have their 99.5th percentile of |z| below it.

    Imagen's bound of 1 presumes data in [-1, 1] (Saharia et al. 2022, section 2.3); standardised latents reach further.

    Args:
        codec: standardises.
        raw_means: all training latents, or the means of their distributions, in parts (N, C, h, w).
    """
    percentiles = [
        quantile(codec.standardise(rows).flatten(1).abs(), BOUND_PERCENTILE)
        for means in raw_means
        for rows in means.split(ROWS_AT_ONCE)
    ]
    return round(float(np.quantile(torch.cat(percentiles).numpy(), BOUND_SHARE)), 4)
