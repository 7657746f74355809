"""The network as a model of diffusers."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from latentloom.diffusion.text import Text
from latentloom.diffusion.unet import UNet


class LatentLoomUNet(UNet, ModelMixin, ConfigMixin):
    """A `UNet` that takes a caption as plain tensors, with what its training fixed of latents in its config.

    The config has the names of a model folder's ``config.json``: ``latent_shape`` (C, h, w) is what is sampled unless
    asked otherwise, ``latent_shapes`` are all that it was trained on, where there are several; the VAE's own latents
    are ``latents * latent_std + latent_mean``.
    """

    @register_to_config
    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        widths: tuple[int, ...],
        block_depth: int,
        emb_size: int,
        text_dim: int,
        latent_mean: tuple[float, ...],
        latent_std: tuple[float, ...],
        token_dim: int | None = None,
        latent_shapes: tuple[tuple[int, int, int], ...] | None = None,
    ):
        several = latent_shapes is not None
        super().__init__(latent_shape[0], widths, block_depth, emb_size, text_dim, token_dim, several)

    def forward(
        self,
        x_t: torch.Tensor,
        noise_levels: torch.Tensor,
        pooled: torch.Tensor,
        tokens: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the clean latents (B, C, h, w) from noised ones.

        ``noise_levels`` (B,) in [0, 1]; ``pooled`` (B, text_dim); of a model of token states also ``tokens`` (B, T,
        token_dim) and ``mask`` (B, T), bool, which of them are seen.
        """
        return super().forward(x_t, noise_levels, pooled if tokens is None else Text(pooled, tokens, mask))
