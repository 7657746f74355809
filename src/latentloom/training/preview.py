"""What the model generates while it trains: the same captions from the same noise, so that grids compare over time.

Nothing here decides a weight.
"""

import numpy as np
import torch
from torch import nn

from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.diffusion.text import concatenate
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import Caches
from latentloom.encoding.vae import Vae
from latentloom.image_grid import image_grid
from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.randomness import generator

DIFFUSION_STEPS, SAMPLER = 20, "dpmpp_2m"
IMAGES_AT_ONCE = 16


class Previews:
    """Generates the preview grids of one training.

    Half of the images have captions of the training split, half of validation (or as many as there are): the first ones
    by id. The VAE's files are fetched here, which may be a long download; its weights are loaded for the first grid.
    ``dtype`` is for autocast; None computes in fp32.
    """

    def __init__(self, params: Params, config: ModelConfig, caches: Caches, dtype: torch.dtype | None) -> None:
        train, validation, count = caches.train, caches.validation, params.monitor.sample_count
        vae = Vae(config.vae.reference, train.device)
        self._codec = LatentCodec(config.latent_mean, config.latent_std, lambda: vae)
        self._settings = SamplingSettings(DIFFUSION_STEPS, params.monitor.sample_guidance, SAMPLER)
        self._config, self._dtype = config, dtype
        from_validation = validation.take(count // 2)
        from_train = train.take(count - len(from_validation))
        captioned = [data for data in (from_train, from_validation) if len(data)]
        self._embeddings = concatenate([data.primary_embeddings() for data in captioned])
        shape = (len(self._embeddings), *train.latent_shape)
        self._noise = torch.randn(shape, generator=generator("cpu", params.seed, "preview")).to(train.device)

    def generate(self, network: nn.Module) -> np.ndarray:
        """A grid of samples, uint8 (H, W, 3), in the captions' order; ``IMAGES_AT_ONCE`` are computed at a time."""
        diffuser = Diffuser(
            network,
            settings=self._settings,
            schedule=self._config.schedule,
            bound=self._config.latent_bound,
            latent_channels=self._config.latent_shape[0],
            autocast_dtype=self._dtype,
        )
        images = []
        for start in range(0, len(self._noise), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            latents = diffuser.reverse_diffusion(self._noise[part], self._embeddings[part], layout="nchw")
            images.append(self._codec.decode(latents, batch_size=IMAGES_AT_ONCE))
        return image_grid(np.concatenate(images))
