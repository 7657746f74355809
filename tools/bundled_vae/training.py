"""Training of the bundled VAE: pictures -> latents, noise on the latents -> pictures again.

The noise is the point. A diffusion model's latents are never quite right, so the decoder learns to read latents
that are off by up to `noise` standard deviations, and the encoder learns latents that can be read so. `train`
yields its state after every step and knows nothing of files; the script evaluates, reports and saves.
All random numbers are a function of (seed, step), so an interrupted run resumes from its last checkpoint.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from bundled_vae.data import Pictures, draw_batch
from bundled_vae.network import Architecture, TrainingAutoencoder, plain_autoencoder, standardise
from bundled_vae.optimizer import build_optimizers


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, apart from the pictures."""

    architecture: Architecture
    steps: int
    batch_size: int
    seed: int = 0
    muon_rate: float = 0.002  #      spectral norm of one step of a kernel
    adam_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_start: int = 10**9  #      step from which the rates fall, to zero after the last
    decay_knots: tuple[tuple[int, float], ...] = ()  # (step, factor) points that the falling rates pass through
    noise: float = 0.35  #           largest std of the noise on the latents
    decay_noise: float = 0.28  #     the same while the rates fall: less, for the sake of clean latents
    clean_share: float = 0.2  #      share of pictures decoded without noise
    edge_weight: float = 0.5
    rmse_weight: float = 1.0
    log_mse_weight: float = 0.0  #   of the term that serves the mean PSNR directly, from step `log_mse_start` on
    log_mse_start: int = 0
    exact_share: float = 0.5  #      share of a batch that is exact renders, at least a half
    decay_exact_share: float = 0.75  # the same while the rates fall
    recoloured: float = 0.3
    ema_decay: float = 0.995

    def rate(self, step: int) -> float:
        """The learning rates' factor at `step`: warm-up, plateau, decay in straight lines (warmup-stable-decay)."""
        knots = [(self.decay_start, 1.0), *self.decay_knots, (max(self.steps, self.decay_start + 1), 0.0)]
        return min(1.0, (step + 1) / self.warmup_steps, float(np.interp(step, *zip(*knots, strict=True))))


@dataclass
class TrainingState:
    """Where a training stands after `step` steps; `average` is the moving average of the weights."""

    network: TrainingAutoencoder
    average: TrainingAutoencoder
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def begin(recipe: Recipe) -> TrainingState:
    """A fresh state, its weights drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    network = TrainingAutoencoder(recipe.architecture).to(memory_format=torch.channels_last)
    optimizers = build_optimizers(network, recipe.muon_rate, recipe.adam_rate, recipe.weight_decay)
    return TrainingState(network, copy.deepcopy(network).eval().requires_grad_(False), optimizers)


def train(state: TrainingState, pictures: Pictures, recipe: Recipe, bf16: bool = True) -> Iterator[TrainingState]:
    """Train up to `recipe.steps`, yielding the same state, updated, after each step."""
    base_rates = [[recipe.muon_rate], [recipe.adam_rate]]
    while state.step < recipe.steps:
        decaying = state.step >= recipe.decay_start
        exact_share = recipe.decay_exact_share if decaying else recipe.exact_share
        images = draw_batch(
            pictures, recipe.batch_size, recipe.seed, state.step, exact_share=exact_share, recoloured=recipe.recoloured
        )
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latent = state.network.encode(images)
            decoded = state.network.decode(latent + latent_noise(latent, recipe, state.step))
        parts = losses(decoded, images)
        loss = parts["l1"] + recipe.edge_weight * parts["edges"] + recipe.rmse_weight * parts["rmse"]
        if state.step >= recipe.log_mse_start:
            loss = loss + recipe.log_mse_weight * parts["log_mse"]
        loss.backward()
        for optimizer, rates in zip(state.optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * recipe.rate(state.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _update_average(state, recipe.ema_decay)
        state.step += 1
        state.losses = {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}
        yield state


def latent_noise(latent: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Gaussian noise for latents `(B, C, h, w)`, its std for each picture from U(0, `recipe.noise`)."""
    generator = torch.Generator().manual_seed((recipe.seed + 1) * 7_000_003 + step)
    strength = torch.rand(2, latent.shape[0], 1, 1, 1, generator=generator)
    largest = recipe.decay_noise if step >= recipe.decay_start else recipe.noise
    std = torch.where(strength[0] < recipe.clean_share, 0.0, strength[1] * largest)
    return std * torch.randn(latent.shape, generator=generator)


def losses(decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Means over the batch, pixels `(B, 3, H, W)` in [0, 1].

    `l1`: absolute error. `edges`: absolute error of the differences between neighbours, which keeps outlines crisp.
    `rmse`: root mean squared error of each picture. `log_mse`: its logarithm, which is the PSNR but for a factor.
    """
    error = decoded - images
    return {
        "l1": error.abs().mean(),
        "edges": error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean(),
        "rmse": (error.square().mean((1, 2, 3)) + 1e-6).sqrt().mean(),
        "log_mse": (error.square().mean((1, 2, 3)) + 1e-5).log().mean(),
    }


@torch.no_grad()
def _update_average(state: TrainingState, decay: float) -> None:
    decay = min(decay, (1 + state.step) / (10 + state.step))
    torch._foreach_lerp_(list(state.average.parameters()), list(state.network.parameters()), 1 - decay)
    for average, buffer in zip(state.average.buffers(), state.network.buffers(), strict=True):
        average.copy_(buffer)


@torch.no_grad()
def finished_vae(state: TrainingState, images: Tensor) -> AutoencoderTiny:
    """The averaged weights as a plain `AutoencoderTiny`, its latents of uint8 `images` of zero mean and unit std."""
    vae = plain_autoencoder(state.average)
    latents = encode_all(vae, images)
    standardise(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, images: Tensor, batch_size: int = 32) -> Tensor:
    """uint8 pictures `(N, 3, H, W)` -> latents `(N, 4, H/8, W/8)`, float32."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latents for part in images.split(batch_size)])


@torch.no_grad()
def reconstruct(vae: AutoencoderTiny, images: Tensor, noise: float, seed: int = 0, batch_size: int = 32) -> Tensor:
    """uint8 pictures -> their reconstructions `(N, 3, H, W)` in [0, 1], with noise of std `noise` on the latents."""
    latents = encode_all(vae, images, batch_size)
    latents = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([vae.decode(part).sample.add(1).div(2).clamp(0, 1) for part in latents.split(batch_size)])


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, `(N,)`; `decoded` in [0, 1], `images` uint8."""
    squared = (decoded.double() - images.double() / 255).square().mean((1, 2, 3))
    return -10 * torch.log10(squared.clamp_min(1e-10))


def evaluate(
    vae: AutoencoderTiny, images: Tensor, noises: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3)
) -> dict[float, float]:
    """Mean PSNR in dB on uint8 `images` for each std of noise on the latents."""
    return {noise: psnr(reconstruct(vae, images, noise), images).mean().item() for noise in noises}
