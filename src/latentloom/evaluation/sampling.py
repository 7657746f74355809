"""Sampling from a model folder: captions in, pictures out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.unet import UNet
from latentloom.encoding.dataset import LatentDataset
from latentloom.model_files import ModelConfig
from latentloom.randomness import generator

BATCH_SIZE = 64
PART = 8192  # training latents looked at together


@dataclass(frozen=True)
class Sampler:
    """A model with its sampling settings.

    Attributes:
        network: predicts clean latents, standardised.
        config: the model folder's config.
        guidance: 1 is the plain conditional model; more follows the caption more closely.
        steps: denoising steps.
        threshold_percentile: of dynamic thresholding; the bound is the config's.
        dtype: for autocast; None computes in fp32.
        sampler: how a sample gets from noise level to noise level, a name that the `Diffuser` knows.
        guidance_interval: the lowest and the highest noise level at which guidance acts.
        guidance_rescale: how far contrast that guidance added is taken back, from 0 to 1.
        batch_size: samples computed together.
    """

    network: UNet
    config: ModelConfig
    guidance: float
    steps: int
    threshold_percentile: float
    dtype: torch.dtype | None
    sampler: str = "ddim"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    batch_size: int = BATCH_SIZE

    def latents(self, embeddings: torch.Tensor, names: Sequence[str], seed: int) -> torch.Tensor:
        """Sample a standardised latent (B, C, h, w) for each text embedding (B, dim), on the network's device.

        The noise that a sample starts from is a function of ``seed`` and its name alone, so asking for more samples
        does not change those already asked for.
        """
        device = next(self.network.parameters()).device
        noise = torch.stack([self.starting_noise(name, seed) for name in names]).to(device)
        diffuser = Diffuser(
            self.network,
            self.guidance,
            self.steps,
            schedule=self.config.schedule,
            perc=self.threshold_percentile,
            bound=self.config.latent_bound,
            latent_channels=self.config.latent_shape[0],
            autocast_dtype=self.dtype,
            sampler=self.sampler,
            guidance_interval=self.guidance_interval,
            guidance_rescale=self.guidance_rescale,
        )
        samples = []
        with tqdm(total=len(names), desc="sample", unit="image") as progress:
            for start in range(0, len(names), self.batch_size):
                part = slice(start, start + self.batch_size)
                samples.append(diffuser.reverse_diffusion(noise[part], embeddings[part].to(device), layout="nchw"))
                progress.update(len(samples[-1]))
        return torch.cat(samples)

    def starting_noise(self, name: str, seed: int) -> torch.Tensor:
        """The noise (C, h, w) that the sample of that name starts from."""
        return torch.randn(self.config.latent_shape, generator=generator("cpu", seed, "sample", name))


def recall_at_1(samples: torch.Tensor, train: LatentDataset) -> float:
    """Of samples (B, C, h, w), the share whose nearest training latent, of all, is the one in their own row."""
    return float((nearest(samples, train) == np.arange(len(samples))).mean())


def nearest(samples: torch.Tensor, train: LatentDataset) -> np.ndarray:
    """For each sample (B, C, h, w) the row of the closest latent of ``train``, by Euclidean distance."""
    queries, exact = samples.flatten(1).float(), "donot_use_mm_for_euclid_dist"
    best = torch.full((len(samples),), torch.inf, device=samples.device)
    rows = torch.zeros(len(samples), dtype=torch.long, device=samples.device)
    for part, latents in train.parts(PART):
        distance, row = torch.cdist(queries, latents.flatten(1), compute_mode=exact).min(1)
        rows = torch.where(distance < best, row + part.start, rows)
        best = torch.minimum(best, distance)
    return rows.cpu().numpy()
