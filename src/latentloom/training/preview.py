"""What the model generates while it trains: the same captions from the same noise, so that grids compare over time.

Nothing here decides a weight.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.diffusion.text import Labels, concatenate
from latentloom.encoding.codec import LatentCodec, batches_by_shape
from latentloom.encoding.dataset import Caches
from latentloom.encoding.text_embedder import embed
from latentloom.encoding.text_encoder import TextEncoder
from latentloom.encoding.vae import Vae
from latentloom.errors import UserError
from latentloom.image_grid import captioned_grid
from latentloom.model_files import ModelConfig
from latentloom.params import Params
from latentloom.randomness import generator

SAMPLER = "dpmpp_2m"
IMAGES_AT_ONCE = 16


def prompt_reader(params: Params, config: ModelConfig) -> Callable[[], Labels] | None:
    """What embeds ``previews.prompts`` when it is called; None where there are none.

    The text encoder's files are fetched here, its weights are loaded in the call, and let go of.

    Raises:
        UserError: when the text encoder is not to be had, or is not the one that embedded the captions.
    """
    prompts, wanted = params.previews.prompts, config.text_encoder
    if not prompts:
        return None
    encoder = TextEncoder(wanted.reference, max_tokens=config.max_tokens)
    if encoder.fingerprint != wanted.fingerprint:
        raise UserError(f"{wanted.reference} is another text encoder now than when it embedded the captions")
    return lambda: embed(encoder, prompts, tokens=config.token_dim is not None)


class Previews:
    """Generates the preview grids of one training.

    First come the prompts, then captions of the training split, then as many of validation (or as many as there are):
    the first ones by id, each in the shape of its own picture. The VAE's files are fetched here, which may be a long
    download; its weights are loaded for the first grid.

    Args:
        params: of all stages.
        config: of the model.
        caches: the captions.
        prompts: what the network reads of ``previews.prompts``; None: they are not shown.
        dtype: for autocast; None computes in fp32.

    Raises:
        UserError: when the VAE is not to be had, or is not the one that encoded the images.
    """

    def __init__(
        self, params: Params, config: ModelConfig, caches: Caches, prompts: Labels | None, dtype: torch.dtype | None
    ) -> None:
        settings, train = params.previews, caches.train
        vae = Vae(config.vae.reference, train.device)
        if vae.fingerprint != config.vae.fingerprint:
            raise UserError(f"{config.vae.reference} is another VAE now than when it encoded the images")
        self._codec = LatentCodec(config.latent_mean, config.latent_std, lambda: vae)
        self._settings = SamplingSettings(settings.steps, settings.guidance, SAMPLER)
        self._config, self._dtype = config, dtype
        held_out = caches.validation.take(settings.captions // 2)
        known = train.take(settings.captions - len(held_out))
        shown = settings.prompts if prompts is not None else []
        self._captions = [(prompt, "prompt") for prompt in shown]
        self._captions += [(caption, "training") for caption in known.primary_texts()]
        self._captions += [(caption, "validation") for caption in held_out.primary_texts()]
        labels = [] if prompts is None else [prompts.to(train.device)]
        self._embeddings = concatenate(labels + [data.primary_embeddings() for data in (known, held_out) if len(data)])
        # A function of seed, name and shape alone: with another prompt, the others stay as they were.
        starts = [(f"prompt {prompt}", caches.latent_shape) for prompt in shown]
        starts += [
            (own, bucket.latent_shape)
            for data in (known, held_out)
            for bucket in data.buckets
            for own in bucket.names()
        ]
        self._noise = [
            torch.randn(shape, generator=generator("cpu", settings.seed, "preview", name)).to(train.device)
            for name, shape in starts
        ]

    def index(self) -> str:
        """The captions of a grid's images, row by row, in full and with where they are from, as JSON."""
        return json.dumps([{"caption": caption, "from": source} for caption, source in self._captions], indent=2)

    def generate(self, network: nn.Module) -> np.ndarray:
        """A grid of captioned samples, uint8 (H, W, 3); ``IMAGES_AT_ONCE`` are computed at a time."""
        diffuser = Diffuser(
            network,
            settings=self._settings,
            schedule=self._config.schedule,
            bound=self._config.latent_bound,
            latent_channels=self._config.latent_shape[0],
            autocast_dtype=self._dtype,
        )
        images: dict[int, np.ndarray] = {}
        for part in batches_by_shape([noise.shape for noise in self._noise], IMAGES_AT_ONCE):
            noise = torch.stack([self._noise[place] for place in part])
            latents = diffuser.reverse_diffusion(noise, self._embeddings[torch.tensor(part)], layout="nchw")
            images |= zip(part, self._codec.decode(latents, batch_size=IMAGES_AT_ONCE), strict=True)
        return captioned_grid([images[place] for place in sorted(images)], [caption for caption, _ in self._captions])
