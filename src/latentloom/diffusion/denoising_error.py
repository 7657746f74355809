"""The validation error: how far denoised latents are from the truth, on noise that is the same at every call.

Rows are noised at the same fixed levels, with noise that the row's place alone decides. So two models, or two moments
of one training, differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

import torch
from torch import nn

from latentloom.diffusion.noise import get_schedule, noise_levels_from_uniform
from latentloom.diffusion.text import Labels

LEVELS_PER_ROW = 8
ROWS_PER_CHUNK = 128  # fixed: a chunk's number seeds its noise
NOISE_SEED = 1_618_033_988_749  # far from the small seeds that people choose, whose noise may be in the data
BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


class LatentRows(Protocol):
    """Latents of one shape that can be read by slices, with the embeddings of each image's primary caption."""

    latent_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def latents_at(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    def primary_embeddings(self, rows: slice) -> Labels: ...


class Buckets(Protocol):
    """A data set of latents of one or more shapes; it can be cut to its first images."""

    device: torch.device
    buckets: Sequence[LatentRows]

    def __len__(self) -> int: ...

    def take(self, count: int) -> Buckets: ...


class Processes(Protocol):
    """The processes of a job, as `accelerate.Accelerator` knows them."""

    process_index: int
    num_processes: int

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor: ...


def bin_name(low: float, high: float) -> str:
    """What a bin of noise levels is called in metrics: ``noise_0.25-0.50``."""
    return f"noise_{low:.2f}-{high:.2f}"


@torch.no_grad()
def denoising_error(
    network: nn.Module,
    data: Buckets,
    *,
    schedule: str,
    noise_levels: str,
    images: int | None = None,
    dtype: torch.dtype | None = None,
    accelerator: Processes | None = None,
) -> dict[str, float]:
    """The mean absolute error of the predicted clean latents, over rows and ``LEVELS_PER_ROW`` noise levels each.

    The levels are the midpoints of equal slices of the training distribution ``noise_levels``, so the mean compares
    with the training loss. Noise is made on the device of the data. The processes of ``accelerator`` share the rows and
    all get the result that one process would.

    Args:
        images: how many rows are measured, the first ones; None: all.
        dtype: for autocast; None computes in fp32.

    Returns:
        ``mae``, and ``mae_noise_LOW-HIGH`` for each bin of noise levels that a level falls into, in units of a latent's
        standard deviation; empty when there are no rows.
    """
    if images is not None:
        data = data.take(images)
    if not len(data):
        return {}
    device = data.device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    forward = get_schedule(schedule)
    midpoints = (torch.arange(LEVELS_PER_ROW, device=device) + 0.5) / LEVELS_PER_ROW
    levels = noise_levels_from_uniform(midpoints, noise_levels).tolist()
    chunks = [
        (bucket, slice(start, min(start + ROWS_PER_CHUNK, len(bucket))))
        for bucket in data.buckets
        for start in range(0, len(bucket), ROWS_PER_CHUNK)
    ]
    # One cell per chunk, so that sums are taken in the same order whichever process filled it.
    errors = torch.zeros(len(chunks), LEVELS_PER_ROW, device=device)
    for chunk in range(process, len(chunks), processes):
        bucket, part = chunks[chunk]
        clean, _ = bucket.latents_at(part)
        generator = torch.Generator(device).manual_seed(NOISE_SEED + chunk)
        # Always a whole chunk's numbers: on CUDA, a shorter tensor would get others from the same seed.
        noise = torch.randn(ROWS_PER_CHUNK, *bucket.latent_shape, generator=generator, device=device)[: len(clean)]
        labels = bucket.primary_embeddings(part)
        for number, level in enumerate(levels):
            level_per_row = torch.full((len(clean),), level, device=device)
            noisy = forward.add_noise(clean, noise, level_per_row)
            with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                predicted = network(noisy, level_per_row, labels)
            errors[chunk, number] = (predicted.float() - clean).abs().mean((1, 2, 3)).sum()
    if accelerator:
        errors = accelerator.reduce(errors, "sum")
    by_level = dict(zip(levels, (errors.cpu().double().sum(0) / len(data)).tolist(), strict=True))
    return {"mae": fmean(by_level.values())} | {
        f"mae_{bin_name(low, high)}": fmean(inside)
        for low, high in BINS
        if (inside := [error for level, error in by_level.items() if low <= level < high])
    }
