"""The training loop: it computes steps and yields what they measured; logging, files and tracking are the caller's.

A step: take this process's part of the global batch, noise the clean latents, predict them back, and update the weights
and their exponential moving average. With several processes, each holds the whole network, and Accelerate
averages the gradients over them.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from latentloom.devices import autocast
from latentloom.diffusion.noise import get_schedule
from latentloom.encoding.dataset import LatentDataset, Split
from latentloom.errors import UserError
from latentloom.params import Compile, DiffusionParams, TrainParams
from latentloom.training.batches import Batch, batches
from latentloom.training.graphs import use_graphs
from latentloom.training.optimizers import build_optimizers
from latentloom.training.processes import distribute, make_accelerator


@dataclass
class TrainingState:
    """All that a step changes."""

    network: nn.Module  # predicts clean latents from (noisy latents, noise levels, labels)
    average: nn.Module  # the same with averaged weights, in evaluation mode
    optimizers: list[torch.optim.Optimizer]  # of the network's weights; each weight has one
    step: int = 0  # steps done

    @classmethod
    def start(cls, network: nn.Module, params: TrainParams, dtype: torch.dtype | None = None) -> "TrainingState":
        """The state before the first step of training ``network``, on the device where it lies.

        ``dtype`` is what the training computes in; None is fp32.
        """
        average = copy.deepcopy(network).eval().requires_grad_(False)
        state = cls(network, average, build_optimizers(network, params, dtype or torch.float32))
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        for optimizer in state.optimizers:
            optimizer.step()  # moves no weight, at a rate of 0, but makes the moments, so that a state always has them
            optimizer.zero_grad()
        state.set_step(0)
        return state

    def set_step(self, step: int) -> None:
        """Set how many steps are done."""
        self.step = step
        for optimizer in self.optimizers:
            for moments in optimizer.state.values():
                if "step" in moments:
                    moments["step"].fill_(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state by name, not copied."""
        tensors = {f"network.{name}": weight for name, weight in self.network.named_parameters()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.named_parameters()}
        moments = {weight: own for optimizer in self.optimizers for weight, own in optimizer.state.items()}
        for name, weight in self.network.named_parameters():
            tensors |= {f"{key}.{name}": moment for key, moment in moments[weight].items() if key != "step"}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Copy in what `tensors` gave after ``step`` steps.

        Raises:
            UserError: when a tensor is missing or has another shape, as after an edit of the network.
        """
        for name, tensor in self.tensors().items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = tuple(tensors[name].shape) if name in tensors else "absent"
                raise UserError(
                    f"the checkpoint's {name} is {found}, expected {tuple(tensor.shape)}: it was written by code of "
                    "another network; restore that code to resume, or delete the checkpoint in .state/checkpoints to "
                    "start anew"
                )
            tensor.copy_(tensors[name])
        self.set_step(step)


@dataclass(frozen=True)
class Step:
    """What a step measured; the tensors are 0-d and on the device: reading one waits for the device.

    ``loss`` and ``mae`` (the mean absolute error, in units of a latent's standard deviation) are of this process's part
    of the batch, and the same where ``train.loss`` is mae.
    """

    step: int  # steps done so far, from 1 on
    loss: torch.Tensor
    mae: torch.Tensor
    gradient_norm: torch.Tensor  # before clipping, over all processes


def learning_rate_at(step: int, params: TrainParams) -> float:
    """The learning rate of step ``step`` (from 0): a linear warm-up, then what ``train.lr_schedule`` names.

    cosine               half a cosine down to zero (Loshchilov & Hutter 2017); it needs to know its end from the start
    constant             stays; a finished run can be extended
    warmup_stable_decay  stays, then falls to zero over the last ``decay_steps`` as 1 - sqrt (Hu et al. 2024; the shape:
                         Hägele et al. 2024, section 3); a finished run can be extended from where its decay began
    """
    if step < params.warmup_steps:
        return params.learning_rate * (step + 1) / params.warmup_steps
    if params.lr_schedule == "cosine":
        progress = (step - params.warmup_steps) / max(params.steps - params.warmup_steps, 1)
        return params.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    if step < open_ended_steps(params):
        return params.learning_rate
    return params.learning_rate * (1.0 - math.sqrt((step - open_ended_steps(params)) / params.decay_steps))


def open_ended_steps(params: TrainParams) -> int:
    """How many steps are the same for every ``train.steps`` that is no less: those before a decay."""
    return {
        "cosine": 0,
        "constant": params.steps,
        "warmup_stable_decay": params.steps - params.decay_steps,
    }[params.lr_schedule]


def ema_decay_at(step: int, batch_size: int, horizon: float) -> float:
    """The averaging decay of step ``step`` (from 0): a weight counts 1/e after ``horizon`` images.

    At first the horizon is a tenth of the images seen, so that the first weights are soon forgotten; stated in images,
    it means the same at every batch size (Karras et al. 2024, section 3.1 and appendix C).
    """
    return math.exp(-batch_size / min(horizon, 0.1 * (step + 1) * batch_size))


def rank_slices(batch_size: int, parts: int, process: int, processes: int) -> list[slice]:
    """The positions in the global batch that a process computes, one slice for each of its ``parts``.

    Raises:
        UserError: when the batch does not divide into equal parts, naming the key to change.
    """
    size, left = divmod(batch_size, processes * parts)
    if left:
        raise UserError(
            f"train.batch_size {batch_size} does not divide into {processes} processes x {parts} parts "
            f"(train.gradient_accumulation); make it a multiple of {processes * parts}"
        )
    first = process * parts
    return [slice(number * size, (number + 1) * size) for number in range(first, first + parts)]


def train(
    state: TrainingState,
    data: LatentDataset | Split,
    *,
    params: TrainParams,
    diffusion: DiffusionParams,
    seed: int,
    dtype: torch.dtype | None = None,
    accelerator: Accelerator | None = None,
    compiled: Compile = False,
) -> Iterator[Step]:
    """Train from ``state``, which is updated in place, to ``params.steps``; yield after every step.

    Args:
        state: on the same device as ``data``.
        seed: every random number is a function of it, the step and the position in the global batch.
        dtype: for autocast; None computes in fp32.
        accelerator: of this process; None: the only one.
        compiled: what ``machine.compile`` says.
    """
    device = data.device
    accelerator = accelerator or make_accelerator(device)
    schedule = get_schedule(diffusion.schedule)
    draw = partial(
        batches,
        data,
        seed=seed,
        batch_size=params.batch_size,
        block_rows=params.block_rows,
        distribution=diffusion.noise_levels,
        label_dropout=diffusion.label_dropout,
        parts=rank_slices(
            params.batch_size,
            params.gradient_accumulation,
            accelerator.process_index,
            accelerator.num_processes,
        ),
    )
    state.network.train()
    graphs = compiled == "cuda_graphs"
    if graphs:
        [(example, *_)] = draw(steps=[state.step])
        use_graphs(state.network, example, dtype)
    elif compiled:
        # A graph per shape of batches: dynamo would give up after its own, lower limit, and compute as if not asked.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, len(data.buckets) + 1)
        state.network.compile(dynamic=False)
    network = distribute(state.network, accelerator, params)
    # Parts can only be added up in memory that is not the graphs' own.
    adds_up = graphs and params.gradient_accumulation > 1
    if adds_up:
        for weight in state.network.parameters():
            weight.grad = torch.zeros_like(weight)
    weights, averaged = list(state.network.parameters()), list(state.average.parameters())

    def errors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = schedule.add_noise(batch.latents, batch.noise, batch.noise_levels)
        with autocast(dtype, device):
            predicted = network(noisy, batch.noise_levels, batch.labels)
        return losses(predicted.float(), batch.latents, params)

    for step, parts in enumerate(draw(steps=range(state.step, params.steps)), start=state.step):
        for optimizer in state.optimizers:
            optimizer.zero_grad(set_to_none=not adds_up)
        measured = []
        for number, batch in enumerate(parts, start=1):
            last = number == len(parts)
            with nullcontext() if last else accelerator.no_sync(network):
                loss, mae = errors(batch)
                accelerator.backward(loss / len(parts))
            measured.append(torch.stack([loss.detach(), mae.detach()]))
        gradient_norm = nn.utils.clip_grad_norm_(weights, params.gradient_clip, foreach=True)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, params)
            optimizer.step()
        with torch.no_grad():  # else the average would remember every step in a graph that grows
            torch._foreach_lerp_(averaged, weights, 1.0 - ema_decay_at(step, params.batch_size, params.ema_images))
        state.step = step + 1
        loss, mae = torch.stack(measured).mean(0)
        yield Step(state.step, loss, mae, gradient_norm)


def losses(predicted: torch.Tensor, latents: torch.Tensor, params: TrainParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss that ``train.loss`` names, and the mean absolute error, of latents (B, C, h, w).

    ``huber`` is divided by its delta, so that far errors count as in ``mae`` (as `smooth_l1_loss`, Girshick 2015).
    """
    mae = nn.functional.l1_loss(predicted, latents)
    if params.loss == "mse":
        return nn.functional.mse_loss(predicted, latents), mae
    if params.loss == "huber":
        return nn.functional.smooth_l1_loss(predicted, latents, beta=params.huber_delta), mae
    return mae, mae
