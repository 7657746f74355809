"""The training loop: it computes steps and yields their state; logging, files and tracking are the caller's.

A step: draw a batch, noise the clean latents, predict them back, take the mean absolute error, and update the weights
(AdamW) and their exponential moving average.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from latentloom.devices import autocast
from latentloom.diffusion import get_schedule
from latentloom.params import DiffusionParams, TrainParams
from latentloom.training.dataset import LatentDataset
from latentloom.training.draws import RowOrder, draw_batch


class TrainingDivergedError(ArithmeticError):
    """The loss or the gradient stopped being a finite number."""


@dataclass(frozen=True)
class StepState:
    """What the loop shows after a step.

    Attributes:
        step: steps done so far, from 1 on.
        mae: the step's training loss, the mean absolute error in units of a latent's standard deviation (a 0-d tensor
            on the device: reading it waits for the device).
        gradient_norm: before clipping (a 0-d tensor on the device).
        learning_rate: the rate that the step used.
        average: the network with averaged weights, in evaluation mode.
    """

    step: int
    mae: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float
    average: nn.Module


def learning_rate_at(step: int, params: TrainParams) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017)."""
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    progress = (step - params.warmup_steps) / max(params.steps - params.warmup_steps, 1)
    return params.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def ema_decay_at(step: int, batch_size: int, horizon: float) -> float:
    """The averaging decay of step ``step`` (from 0): a weight counts 1/e after ``horizon`` images.

    At first the horizon is a tenth of the images seen, so that the first weights are soon forgotten; stated in images,
    it means the same at every batch size (Karras et al. 2024, section 3.1 and appendix C).
    """
    return math.exp(-batch_size / min(horizon, 0.1 * (step + 1) * batch_size))


def train(
    network: nn.Module,
    data: LatentDataset,
    *,
    params: TrainParams,
    diffusion: DiffusionParams,
    seed: int,
    dtype: torch.dtype | None = None,
) -> Iterator[StepState]:
    """Train ``network`` in place on ``data``, which lies on the network's device; yield after every step.

    Args:
        network: predicts clean latents from (noisy latents, noise levels, text embeddings).
        data: the training split.
        params: the ``train`` section.
        diffusion: the ``diffusion`` section.
        seed: every draw is a function of it and the step.
        dtype: for autocast; None computes in fp32.

    Raises:
        TrainingDivergedError: when the loss or the gradient of a step was not finite; looked at every
            ``params.log_every`` steps, so that the device is not waited for at each.
    """
    device = data.device
    schedule = get_schedule(diffusion.schedule)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    weights, averaged = list(network.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(
        _decay_groups(network, params.weight_decay),
        lr=params.learning_rate,
        betas=(0.9, 0.99),
        fused=device.type in ("cpu", "cuda"),
    )
    network.train()
    unchecked: list[torch.Tensor] = []
    order = RowOrder.of(data, seed)
    for step in range(params.steps):
        batch = draw_batch(
            data,
            order,
            seed=seed,
            step=step,
            batch_size=params.batch_size,
            distribution=diffusion.noise_levels,
            label_dropout=diffusion.label_dropout,
        )
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.noise_levels)
        with autocast(dtype, device):
            predicted = network(noisy, batch.noise_levels, batch.labels)
        loss = nn.functional.l1_loss(predicted.float(), batch.latents)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm = nn.utils.clip_grad_norm_(weights, params.gradient_clip, foreach=True)
        rate = learning_rate_at(step, params)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        torch._foreach_lerp_(averaged, weights, 1.0 - ema_decay_at(step, params.batch_size, params.ema_images))

        unchecked.append(torch.stack([loss.detach(), gradient_norm]))
        if (step + 1) % params.log_every == 0 or step + 1 == params.steps:
            _check_finite(torch.stack(unchecked), last_step=step + 1)
            unchecked.clear()
        yield StepState(step + 1, loss.detach(), gradient_norm, rate, average)


def _decay_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices and kernels alone: biases and norms have nothing to shrink to."""
    kernels = [weight for weight in network.parameters() if weight.ndim > 1]
    others = [weight for weight in network.parameters() if weight.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _check_finite(values: torch.Tensor, last_step: int) -> None:
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        first = int(bad[0])
        mae, norm = values[first].tolist()
        raise TrainingDivergedError(
            f"training diverged at step {last_step - len(values) + first + 1}: loss {mae}, gradient norm {norm}. "
            "Try a lower train.learning_rate, more train.warmup_steps, or train.precision: fp32."
        )
