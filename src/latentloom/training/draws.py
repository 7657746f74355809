"""Every random draw of a training step, as a function of (seed, step) alone.

Nothing is carried from one step to the next, so a run that starts again at a step draws what it would have drawn.
"""

import hashlib
from dataclasses import dataclass

import torch

from latentloom.diffusion import noise_levels_from_uniform
from latentloom.training.dataset import LatentDataset


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator seeded by ``parts`` (the seed, what it is for, the step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Batch:
    """What a step needs: clean latents and noise (B, C, h, w), noise levels (B,), text embeddings (B, dim)."""

    latents: torch.Tensor
    noise: torch.Tensor
    noise_levels: torch.Tensor
    labels: torch.Tensor


def batch_rows(seed: int, step: int, batch_size: int, size: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The rows (B,) of step ``step``, out of epochs of ``size`` draws each; see `epoch_rows`."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = positions // size, positions % size
    rows = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        inside = epochs == epoch
        rows[inside] = epoch_rows(seed, epoch, size, weights)[places[inside]]
    return rows


def epoch_rows(seed: int, epoch: int, size: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The rows (N,) of an epoch in random order: each once, or as often as its weight asks.

    With weights (N,), row i comes N w_i / sum(w) times on average, and never more than one time more or less
    (systematic resampling, Kitagawa 1996, appendix).
    """
    draws = generator("cpu", seed, "epoch", epoch)
    order = torch.randperm(size, generator=draws)
    if weights is None:
        return order
    ends = weights[order].double().cumsum(0)
    ends = ends * (size / ends[-1])
    ends[-1] = size  # whatever rounding made of it
    offset = torch.rand((), generator=draws, dtype=torch.float64)
    counts = torch.floor(ends + offset).diff(prepend=torch.zeros(1, dtype=torch.float64)).long()
    return order.repeat_interleave(counts)[torch.randperm(size, generator=draws)]


def draw_batch(
    data: LatentDataset, *, seed: int, step: int, batch_size: int, distribution: str, label_dropout: float
) -> Batch:
    """Draw the batch of a step: rows, captions, mirrored or not, samples of latents, noise, its levels, dropped labels.

    Noise levels are stratified over the batch: one from each of B equal slices of the distribution (in the spirit of
    Kingma et al. 2021, appendix I.1), which lowers the variance of the loss. A dropped label is the zero embedding (Ho
    & Salimans 2022).
    """
    device = data.mean.device
    rows = batch_rows(seed, step, batch_size, len(data), data.weights).to(device)
    draws = generator(device, seed, "step", step)

    def uniform() -> torch.Tensor:
        return torch.rand(batch_size, generator=draws, device=device)

    columns = (uniform() * data.caption_counts[rows]).long()
    labels = data.embeddings[data.captions[rows, columns]]
    labels = labels * (uniform() >= label_dropout).unsqueeze(1)
    latents, std = data.mean[rows], None if data.std is None else data.std[rows]
    if data.flipped_mean is not None:
        mirrored = (uniform() < 0.5).view(-1, 1, 1, 1)
        latents = torch.where(mirrored, data.flipped_mean[rows], latents)
        std = None if std is None else torch.where(mirrored, data.flipped_std[rows], std)
    if std is not None:
        latents = latents + std * torch.randn(latents.shape, generator=draws, device=device)
    strata = torch.randperm(batch_size, generator=draws, device=device)
    noise_levels = noise_levels_from_uniform((strata + uniform()) / batch_size, distribution)
    noise = torch.randn(latents.shape, generator=draws, device=device)
    return Batch(latents, noise, noise_levels, labels)


def batches(data, *, seed, steps, batch_size, distribution, label_dropout, parts):
    """Stand-in until the branch with streaming is merged."""
    for step in steps:
        whole = draw_batch(
            data, seed=seed, step=step, batch_size=batch_size, distribution=distribution, label_dropout=label_dropout
        )
        yield [Batch(whole.latents[p], whole.noise[p], whole.noise_levels[p], whole.labels[p]) for p in parts]
