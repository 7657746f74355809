"""The one codec between the representations of an image, in both directions.

pixels            uint8 (B, 8h, 8w, 3)          what people see
raw latents       fp32 (B, C, h, w)             what the VAE gives and takes; what the cache stores, in fp16
latents           fp32 (B, C, h, w)             standardised per channel: what the UNet sees and predicts

pixels --encode--> raw latents --standardise--> latents --destandardise--> raw latents --decode--> pixels
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch


def batches_by_shape(shapes: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """The places of each shape in ``shapes``, in order, at most ``size`` at a time."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        places.setdefault(tuple(shape), []).append(place)
    for own in places.values():
        yield from (own[start : start + size] for start in range(0, len(own), size))


class LatentCodec:
    """The VAE and the per-channel statistics of the training latents.

    Args:
        mean: per channel (C,), of the raw training latents.
        std: per channel (C,), likewise.
        load_vae: gives the `latentloom.encoding.vae.Vae`; called once, at the first `encode` or `decode`.
            Standardising needs none.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], load_vae: Callable[[], Any] | None = None) -> None:
        self._statistics = tuple(torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
        self._load_vae = load_vae

    @cached_property
    def vae(self) -> Any:
        """The VAE, loaded when it is first needed; `ValueError` where the codec was made without one."""
        if self._load_vae is None:
            raise ValueError("this codec was made without a VAE: it can standardise alone")
        return self._load_vae()

    def standardise(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, C, h, w) as the UNet sees them: zero mean and unit variance per channel."""
        mean, std = self._on(raw.device)
        return (raw.float() - mean) / std

    def standardise_std(self, raw_std: torch.Tensor) -> torch.Tensor:
        """Standard deviations (B, C, h, w) of raw latents in the units of standardised ones."""
        return raw_std.float() / self._on(raw_std.device)[1]

    def destandardise(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents (B, C, h, w) in the VAE's own units: the inverse of `standardise`."""
        mean, std = self._on(latents.device)
        return latents * std + mean

    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels, uint8 (B, H, W, 3), as standardised latents; of a distribution, its mean."""
        return self.standardise(self.vae.encode(pixels)["mean"])

    def decode(self, latents: torch.Tensor, *, batch_size: int = 32) -> np.ndarray:
        """Standardised latents (B, C, h, w) as pixels, uint8 (B, H, W, 3); ``batch_size`` are decoded at a time."""
        return self.vae.decode(self.destandardise(latents), batch_size=batch_size)

    def decode_each(self, latents: Sequence[torch.Tensor], *, batch_size: int = 32) -> list[np.ndarray]:
        """Standardised latents (C, h, w) of any shapes as pixels, uint8 (H, W, 3) each, in order."""
        images: dict[int, np.ndarray] = {}
        for places in batches_by_shape([latent.shape for latent in latents], batch_size):
            decoded = self.decode(torch.stack([latents[place] for place in places]), batch_size=batch_size)
            images |= zip(places, decoded, strict=True)
        return [images[place] for place in range(len(latents))]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std on a device; they stay on the last one, since copying them would wait for it at each batch."""
        mean, std = self._statistics
        if mean.device != device:
            self._statistics = mean, std = mean.to(device), std.to(device)
        return mean, std
