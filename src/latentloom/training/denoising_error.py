"""The validation error: how far denoised latents are from the truth, on noise that is the same at every call.

Each row is noised at the same fixed noise levels, with noise that only its id decides. So two models, or two moments of
one training, differ by the weights alone, and a row added to the split changes nothing for the others.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn

from latentloom.devices import autocast
from latentloom.diffusion.noise import get_schedule, noise_levels_from_uniform
from latentloom.encoding.dataset import LatentDataset
from latentloom.randomness import generator

LEVELS_A_ROW = 8
BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


def bin_name(low: float, high: float) -> str:
    """How a bin of noise levels is called in metrics: ``noise_0.25-0.50``."""
    return f"noise_{low:.2f}-{high:.2f}"


@torch.no_grad()
def denoising_error(
    network: nn.Module,
    data: LatentDataset,
    *,
    schedule: str,
    noise_levels: str,
    dtype: torch.dtype | None = None,
    batch_size: int = 256,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """The mean absolute error of the predicted clean latents, over all rows and ``LEVELS_A_ROW`` noise levels each.

    The levels are the midpoints of equal slices of the training distribution ``noise_levels``, so the mean compares
    with the training loss. Rows are read ``batch_size`` at a time; the processes of ``accelerator`` share them and all
    get the same result.

    Returns:
        ``mae``, and ``mae_noise_LOW-HIGH`` for each bin of noise levels that a level falls into, in units of a latent's
        standard deviation; empty when there are no rows.
    """
    if not len(data):
        return {}
    device = data.device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    forward = get_schedule(schedule)
    slices = (torch.arange(LEVELS_A_ROW, device=device) + 0.5) / LEVELS_A_ROW
    by_level = noise_levels_from_uniform(slices, noise_levels).tolist()
    errors = torch.zeros(LEVELS_A_ROW, device=device)
    for part, clean in data.parts(batch_size, process, processes):
        noise = torch.stack([_noise_of(image_id, data.latent_shape) for image_id in data.ids[part]]).to(device)
        labels = data.embeddings_at(data.captions[part, 0])
        for number, level in enumerate(by_level):
            levels = torch.full((len(clean),), level, device=device)
            noisy = forward.add_noise(clean, noise, levels)
            with autocast(dtype, device):
                predicted = network(noisy, levels, labels)
            errors[number] += (predicted.float() - clean).abs().mean((1, 2, 3)).sum()
    if accelerator:
        errors = accelerator.reduce(errors, "sum")
    means = dict(zip(by_level, (errors / len(data)).tolist(), strict=True))
    return {"mae": _mean(means.values())} | {
        f"mae_{bin_name(low, high)}": _mean(inside)
        for low, high in BINS
        if (inside := [error for level, error in means.items() if low <= level < high])
    }


def _noise_of(image_id: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator("cpu", "validation noise", image_id))


def _mean(values: Sequence[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
