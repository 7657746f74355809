"""How a noise level becomes a vector that a network can use: sinusoids of many frequencies."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from latentloom.diffusion.layouts import Array, to_tensor


def embedding_frequencies(emb_dim: int = 32) -> torch.Tensor:
    """`emb_dim / 2` exponentially spaced frequencies, 1 to 1000 periods over the noise levels."""
    if emb_dim < 2 or emb_dim % 2:
        raise ValueError(f"emb_dim holds pairs of a sine and a cosine, so it must be even, not {emb_dim}")
    return torch.from_numpy(np.geomspace(1.0, 1000.0, emb_dim // 2)).float()


def _sinusoids(levels: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    angles = (2 * math.pi) * levels.reshape(-1, 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sinusoidal_embedding(noise_levels: Array, emb_dim: int = 32) -> Array:
    """Embed noise levels `(B,)`, `(B, 1)` or `(B, 1, 1, 1)` as `(B, emb_dim)`, in the kind that came in.

    `[sin(2 pi f_k alpha), cos(2 pi f_k alpha)]` over `emb_dim / 2` exponentially spaced `f_k` in [1, 1000].
    """
    levels, restore = to_tensor(noise_levels)
    return restore(_sinusoids(levels, embedding_frequencies(emb_dim).to(levels)))


class NoiseEmbedding(nn.Module):
    """`sinusoidal_embedding` as a layer whose frequencies already sit on the device."""

    def __init__(self, emb_dim: int = 32):
        super().__init__()
        self.register_buffer("frequencies", embedding_frequencies(emb_dim), persistent=False)

    def forward(self, noise_levels: torch.Tensor) -> torch.Tensor:
        return _sinusoids(noise_levels.to(self.frequencies), self.frequencies)
