"""What the network is conditioned on, as features: a noise level and a size as sinusoids, a text embedding whitened."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from latentloom.diffusion.layouts import Array, to_tensor

VARIANCE_FLOOR = 1.0  # of the mean variance per direction: what varies less is mostly noise, and stays small


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


class SizeEmbedding(nn.Module):
    """Height and width of a feature map as sinusoids of their logarithms, `(dim,)`: 16, 8, 4 and 2 octaves long.

    What was learnt at two sizes so holds, about, at one between them. The idea is that of SDXL (Podell et al. 2023,
    section 2.2), which tells its network the size of the original picture.
    """

    dim = 16

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2]), persistent=False)

    def forward(self, height: int, width: int) -> torch.Tensor:
        # Numbers of the host times a tensor: nothing is copied to the device.
        angles = torch.cat([self.frequencies * (2 * math.pi * self._log2(side)) for side in (height, width)])
        return torch.cat([angles.sin(), angles.cos()])

    def _log2(self, side: int) -> float | torch.Tensor:
        """Of a side; in a graph that is exported a side is a symbol, of which `math` would keep today's value."""
        return torch.scalar_tensor(side).log2() if torch.compiler.is_exporting() else math.log2(side)


class TextWhitening(nn.Module):
    """Whitened text embeddings or token states `(..., text_dim)`: of zero mean, and of about one variance everywhere.

    Captions that share most words have nearly the same embedding (a cosine of 0.87 between the skin tones of an emoji),
    and what tells them apart lies along directions of little variance, which a network would learn last. Only the
    direction of an embedding counts, so encoders of unit and of larger norm train alike. The features have the norm
    `sqrt(text_dim)`; zeros, "no text", stay zeros. Until `fit` has measured captions, only the norm changes.
    Token states are the same case: most of a caption's tokens stand in most captions.
    """

    def __init__(self, text_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(text_dim))
        self.register_buffer("matrix", torch.eye(text_dim))

    @torch.no_grad()
    def fit(self, embeddings: torch.Tensor) -> None:
        """Measure embeddings or token states `(M, text_dim)`: ZCA whitening, floored (Kessy, Lewin & Strimmer 2018).

        Where all captions are one, there is nothing to tell apart, and nothing changes.
        """
        directions = F.normalize(embeddings.cpu().double(), dim=1)
        variances, axes = torch.linalg.eigh(torch.cov(directions.T, correction=0))
        if variances.max() < 1e-9:
            return
        floored = variances.clamp(min=0) + VARIANCE_FLOOR * variances.mean()
        self.mean.copy_(directions.mean(0))
        self.matrix.copy_((axes * floored.rsqrt()) @ axes.T)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # small differences are the point
            directions = F.normalize(embeddings.to(self.mean), dim=-1)
            features = F.normalize((directions - self.mean) @ self.matrix, dim=-1) * len(self.mean) ** 0.5
        return torch.where(embeddings.any(dim=-1, keepdim=True), features, 0.0)
