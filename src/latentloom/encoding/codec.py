"""The one codec between the representations of an image, in both directions.

pixels            uint8 (B, 8h, 8w, 3)          what people see
raw latents       fp32 (B, C, h, w)             what the VAE gives and takes; what the cache stores
latents           fp32 (B, C, h, w)             standardised per channel: what the UNet sees and predicts

pixels --encode--> raw latents --standardise--> latents --destandardise--> raw latents --decode--> pixels
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch

from latentloom.encoding.vae import Vae


class LatentCodec:
    """The VAE and the per-channel statistics of the training latents.

    Args:
        mean: per channel (C,), of the raw training latents.
        std: per channel (C,), likewise.
        load_vae: gives the VAE; called once, at the first `encode` or `decode`. Standardising needs none.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], load_vae: Callable[[], Vae]) -> None:
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
        self._load_vae = load_vae

    @cached_property
    def vae(self) -> Vae:
        """The VAE, loaded when it is first needed."""
        return self._load_vae()

    def standardise(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, C, h, w) as the UNet sees them: zero mean and unit variance per channel."""
        return (raw.float() - self._mean.to(raw.device)) / self._std.to(raw.device)

    def destandardise(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents (B, C, h, w) in the VAE's own units: the inverse of `standardise`."""
        return latents * self._std.to(latents.device) + self._mean.to(latents.device)

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels, uint8 (B, H, W, 3), as standardised latents; of a distribution, its mean."""
        return self.standardise(self.vae.encode(pixels)["mean"])

    def decode(self, latents: torch.Tensor, *, batch_size: int = 32) -> np.ndarray:
        """Standardised latents (B, C, h, w) as pixels, uint8 (B, H, W, 3); ``batch_size`` are decoded at a time."""
        return self.vae.decode(self.destandardise(latents), batch_size=batch_size)
