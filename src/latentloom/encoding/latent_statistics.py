"""Figures of all training latents, taken in parts, so that any number of them fits into memory.

Mean and standard deviation per channel are of the raw latents, and say how to standardise them. The bound is of the
standardised ones, and says how far they reach.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from latentloom.diffusion.noise import quantile
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.shard_files import Tensors

BOUND_PERCENTILE = 0.995
BOUND_SHARE = 0.99
ROWS_AT_ONCE = 256


class ChannelSums(NamedTuple):
    """Of some latents: how many values a channel has, and in each channel (C,) the sums of values and of squares."""

    count: int
    total: torch.Tensor
    squares: torch.Tensor


def channel_sums(tensors: Tensors) -> ChannelSums:
    """The sums of latents (N, C, h, w), fp16.

    Of latents given by moments, the statistics are those of their samples: Var = Var(mean) + E[std^2].
    """
    values = tensors["mean"].double()
    squares = [tensor.double().square().sum((0, 2, 3)) for tensor in tensors.values()]
    return ChannelSums(values[:, 0].numel(), values.sum((0, 2, 3)), torch.stack(squares).sum(0))


def channel_statistics(parts: Iterable[ChannelSums]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of all latents, from the sums of their parts, of at least one row.

    Plain sums are enough: a square of fp16 has 22 bits, so float64 adds 2^31 equal ones exactly, and the std of a
    channel that never varies is 0.
    """
    count, total, squares = map(sum, zip(*parts, strict=True))
    mean = total / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=0).sqrt().tolist()


def percentiles(codec: LatentCodec, raw_means: torch.Tensor) -> np.ndarray:
    """Of each latent, or mean of its distribution, (N, C, h, w), the 99.5th percentile of |z| (N,).

    Args:
        codec: standardises.
        raw_means: fp16.
    """
    parts = [codec.standardise(rows).flatten(1).abs() for rows in raw_means.split(ROWS_AT_ONCE)]
    return torch.cat([quantile(part, BOUND_PERCENTILE) for part in parts]).numpy()


def latent_bound(parts: Iterable[np.ndarray]) -> float:
    """The bound of dynamic thresholding: 99 % of the latents have their 99.5th percentile of |z| below it.

    Imagen's bound of 1 presumes data in [-1, 1] (Saharia et al. 2022, section 2.3); standardised latents reach further.

    Args:
        parts: the `percentiles` of all training latents.
    """
    return round(float(np.quantile(np.concatenate(list(parts)), BOUND_SHARE)), 4)
