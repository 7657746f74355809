"""What the model draws while it trains: the same captions from the same noise, so that grids compare over time."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from latentloom.diffusion.diffuser import Diffuser
from latentloom.encoding.dataset import Caches
from latentloom.model_files import ModelConfig
from latentloom.randomness import generator

PREVIEW_STEPS = 20


class Decoder(Protocol):
    """Anything that turns raw latents (B, C, h, w) into uint8 images (B, H, W, 3)."""

    def decode(self, latents: torch.Tensor) -> np.ndarray: ...


@dataclass(frozen=True)
class PreviewSubjects:
    """The captions of a preview, with the embedding and the starting noise of each."""

    captions: list[str]
    embeddings: torch.Tensor
    noise: torch.Tensor


def preview_subjects(caches: Caches, count: int, seed: int) -> PreviewSubjects:
    """Half of ``count`` from the training split, half from validation (or as many as there are), the first by id."""
    from_validation = min(count // 2, len(caches.validation))
    from_training = min(count - from_validation, len(caches.train))
    captions, embeddings = [], []
    for data, number in ((caches.train, from_training), (caches.validation, from_validation)):
        shown = data.take(number)
        captions += shown.primary_texts()
        embeddings.append(shown.primary_embeddings())
    noise = torch.randn((len(captions), *caches.train.latent_shape), generator=generator("cpu", seed, "preview"))
    return PreviewSubjects(captions, torch.cat(embeddings), noise.to(caches.train.device))


def draw_preview(
    network: nn.Module,
    config: ModelConfig,
    subjects: PreviewSubjects,
    decoder: Decoder,
    *,
    guidance: float,
    dtype: torch.dtype | None,
) -> np.ndarray:
    """One picture, uint8 (H, W, 3): a sample for each caption, in a grid, in the captions' order."""
    diffuser = Diffuser(
        network,
        guidance,
        PREVIEW_STEPS,
        schedule=config.schedule,
        sampler="dpmpp_2m",
        bound=config.latent_bound,
        latent_channels=config.latent_shape[0],
        autocast_dtype=dtype,
    )
    standardised = diffuser.reverse_diffusion(subjects.noise, subjects.embeddings, layout="nchw")
    return tile(decoder.decode(to_raw(standardised, config)))


def to_raw(standardised: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Standardised latents (B, C, h, w) back in the VAE's own units."""
    mean = torch.tensor(config.latent_mean, device=standardised.device).view(1, -1, 1, 1)
    std = torch.tensor(config.latent_std, device=standardised.device).view(1, -1, 1, 1)
    return standardised * std + mean


def tile(images: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) as one, row by row; places left over are white."""
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    filled = np.full((rows * columns, *images.shape[1:]), 255, dtype=np.uint8)
    filled[: len(images)] = images
    height, width = images.shape[1:3]
    return filled.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
