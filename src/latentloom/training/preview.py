"""What the model generates while it trains: the same captions from the same noise, so that grids compare over time.

Nothing here decides a weight.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import Caches
from latentloom.encoding.vae import load_vae
from latentloom.image_grid import image_grid
from latentloom.model_files import ModelConfig
from latentloom.randomness import generator

SETTINGS = SamplingSettings(diffusion_steps=20, sampler="dpmpp_2m")
IMAGES_AT_ONCE = 16


class PreviewInputs(NamedTuple):
    """The text embedding (N, dim) and the starting noise (N, C, h, w) of each image."""

    embeddings: torch.Tensor
    noise: torch.Tensor


class Previews:
    """Generates the preview grids of one training.

    Args:
        config: of the model.
        caches: whose captions are used; nothing is read, and the VAE is not loaded, before the first grid.
        count: images per grid.
        guidance: class guidance.
        seed: of the training.
        dtype: for autocast; None computes in fp32.
    """

    def __init__(
        self,
        config: ModelConfig,
        caches: Caches,
        *,
        count: int,
        guidance: float,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.config, self.caches, self.count, self.guidance = config, caches, count, guidance
        self.seed, self.dtype = seed, dtype
        device = caches.train.device
        self.codec = LatentCodec(config.latent_mean, config.latent_std, lambda: load_vae(config.vae.reference, device))

    @cached_property
    def inputs(self) -> PreviewInputs:
        """Half of the images from the training split, half from validation (or as many as there are), the first by
        id."""
        train, validation = self.caches.train, self.caches.validation
        from_validation = min(self.count // 2, len(validation))
        from_train = min(self.count - from_validation, len(train))
        embeddings = [
            data.take(number).primary_embeddings()
            for data, number in ((train, from_train), (validation, from_validation))
            if number
        ]
        shape = (from_train + from_validation, *train.latent_shape)
        noise = torch.randn(shape, generator=generator("cpu", self.seed, "preview"))
        return PreviewInputs(torch.cat(embeddings), noise.to(train.device))

    def generate(self, network: nn.Module) -> np.ndarray:
        """A grid of samples, uint8 (H, W, 3), in the captions' order; ``IMAGES_AT_ONCE`` are computed at a time."""
        diffuser = Diffuser(
            network,
            class_guidance=self.guidance,
            settings=SETTINGS,
            schedule=self.config.schedule,
            bound=self.config.latent_bound,
            latent_channels=self.config.latent_shape[0],
            autocast_dtype=self.dtype,
        )
        images = []
        for embeddings, noise in zip(*(part.split(IMAGES_AT_ONCE) for part in self.inputs), strict=True):
            latents = diffuser.reverse_diffusion(noise, embeddings, layout="nchw")
            images.append(self.codec.decode(latents, batch_size=IMAGES_AT_ONCE))
        return image_grid(np.concatenate(images))
