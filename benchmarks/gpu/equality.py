"""Whether the device computes what the CPU computes: a step, batches read ahead, streamed rows, a resumed training.

Each row says how far two ways are apart, how far they may be, and whether they hold. On a CPU both ways are the same
device, so the part then tests itself.
"""

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import train_step
from synthetic import write_caches
from torch import nn
from train_step import Settings

from gpu import variants
from gpu.parts import Job, Record, Unmeasurable
from latentloom.devices import autocast_dtype, choose_device
from latentloom.diffusion import UNet, get_schedule
from latentloom.encoding.dataset import Caches, load_caches
from latentloom.params import DiffusionParams, TrainParams
from latentloom.training import optimizers
from latentloom.training.batches import Batch, batches
from latentloom.training.loop import TrainingState, losses, train
from latentloom.training.orthogonal import newton_schulz

ROWS, HELD_OUT = 192, 32
BATCH, STEPS = 16, 6
SEED = 3
REPEATED = 1e-2  # CUDA adds gradients up in any order, and orthogonal updates enlarge what that rounds; a CPU gives 0


def equality(job: Job, record: Record) -> None:
    """The device against the CPU, and against itself in another way."""
    device = choose_device()
    settings = Settings(job.sizes.widths, job.sizes.depth, BATCH, None, device, False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_caches(folder, ROWS, HELD_OUT)
        held = load_caches(folder / "latents", folder / "text", device=device)
        streamed = load_caches(folder / "latents", folder / "text", device=device, memory_share=0.0)
        with variants.tf32(False):
            record.measure("one step in fp32 on the device and on the CPU", partial(_against_cpu, settings, folder))
            record.measure("channels-last and contiguous memory, fp32", partial(_memory_formats, settings))
            record.measure("streamed and held batches", partial(_streamed_batches, held, streamed))
            record.measure(
                "training on streamed and on held rows", partial(_streamed_training, settings, held, streamed)
            )
            record.measure("a resumed training and one in one go", partial(_resumed, settings, held))
            record.measure("a training with CUDA graphs and one without", partial(_graphed, settings, held))
        with variants.tf32(True):
            record.measure("one step with TF32 and on the CPU", partial(_against_cpu, settings, folder, allowed=1e-2))
        record.measure("layers whose output leaves channels-last memory", partial(_strides, settings))


def _compared(difference: float, allowed: float) -> dict[str, Any]:
    return {"difference": float(f"{difference:.2g}"), "allowed": allowed, "holds": difference <= allowed}


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far two tensors are apart, relative to the second one's norm."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))


def _params(steps: int) -> tuple[TrainParams, DiffusionParams]:
    params, diffusion = train_step.our_params(Settings((1,), 1, BATCH, None, torch.device("cpu"), False))
    return params.model_copy(update={"steps": steps, "warmup_steps": 2}), diffusion


def _batches(caches: Caches, steps: int) -> list[Batch]:
    _, diffusion = _params(steps)
    drawn = batches(
        caches.train,
        seed=SEED,
        steps=range(steps),
        batch_size=BATCH,
        block_rows=None,
        distribution=diffusion.noise_levels,
        label_dropout=diffusion.label_dropout,
        parts=[slice(0, BATCH)],
    )
    return [batch for parts in drawn for batch in parts]


def _loss_and_gradients(network: UNet, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (), and all gradients in one vector, in fp32."""
    params, diffusion = _params(1)
    network.zero_grad()
    noisy = get_schedule(diffusion.schedule).add_noise(batch.latents, batch.noise, batch.noise_levels)
    loss, _ = losses(network(noisy, batch.noise_levels, batch.labels), batch.latents, params)
    loss.backward()
    return loss, _flat(weight.grad for weight in network.parameters())


def _against_cpu(settings: Settings, folder: Path, allowed: float = 1e-3) -> dict[str, Any]:
    """Loss and gradients of the same batch; of the same gradients, the optimizers' update, and the loss after it.

    The same gradients, as an update is all but blind to their size: in it, what rounding made of a gradient near zero
    is as large as any other. And the device's way to orthogonal matrices on both: the CPU's own is another
    approximation, whose singular values are up to a fifth apart (`training/orthogonal.py`).
    """
    batch = _batches(load_caches(folder / "latents", folder / "text"), 1)[0]
    network = _trained_a_little(train_step.our_network(replace(settings, device=torch.device("cpu"))))
    before, rate = _flat(network.parameters()), _params(1)[0].learning_rate
    results, given = [], None
    for device in (torch.device("cpu"), settings.device):
        own = copy.deepcopy(network).to(device, memory_format=torch.channels_last)
        state = TrainingState.start(own, _params(1)[0])
        here = Batch(*(tensor.to(device) for tensor in batch))
        loss, gradients = _loss_and_gradients(own, here)
        given = given or [weight.grad.clone() for weight in own.parameters()]
        for weight, gradient in zip(own.parameters(), given, strict=True):
            weight.grad.copy_(gradient)
        with mock.patch.object(optimizers, "orthogonalised", _as_on_a_device):
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
        update = _flat(own.parameters()).cpu() - before
        results.append((loss, gradients, update, _loss_and_gradients(own, here)[0]))
    theirs, ours = results
    names = ("loss", "gradients", "update", "loss after it")
    parts = {name: _apart(one, other) for name, one, other in zip(names, ours, theirs, strict=True)}
    return {f"of the {name}": float(f"{value:.2g}") for name, value in parts.items()} | _compared(
        max(parts.values()), allowed
    )


def _as_on_a_device(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return newton_schulz(matrices.to(dtype)).to(matrices.dtype)


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _trained_a_little(network: UNet) -> UNet:
    """With no weight at zero, where a layer's last one starts: gradients then reach every weight."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight.device))
    return network


@torch.no_grad()
def _memory_formats(settings: Settings) -> dict[str, Any]:
    network = _trained_a_little(train_step.our_network(settings)).eval()
    device = settings.device
    given = train_step.latents(BATCH, device), torch.rand(BATCH, device=device), train_step.texts(BATCH, device)
    ours = network(*given)
    return _compared(_apart(ours, network.to(memory_format=torch.contiguous_format)(*given)), 1e-3)


def _streamed_batches(held: Caches, streamed: Caches) -> dict[str, Any]:
    pairs = zip(_batches(held, STEPS), _batches(streamed, STEPS), strict=True)
    differing = [
        name
        for ours, theirs in pairs
        for name, one, other in zip(Batch._fields, ours, theirs, strict=True)
        if not torch.equal(one, other)
    ]
    return _compared(float(len(differing)), 0.0)


def _trained(settings: Settings, caches: Caches, *pieces: int) -> torch.Tensor:
    """All weights after a training in pieces of so many steps; each begins from what the one before left."""
    params, diffusion = _params(STEPS)
    network = _trained_a_little(train_step.our_network(settings))
    dtype = autocast_dtype("auto", settings.device)
    state = TrainingState.start(network, params, dtype)
    for number, steps in enumerate(pieces):
        if number:
            saved, done = {name: tensor.detach().cpu() for name, tensor in state.tensors().items()}, state.step
            state = TrainingState.start(train_step.our_network(settings), params, dtype)
            state.load(saved, done)
        running = train(
            state,
            caches.train,
            params=params,
            diffusion=diffusion,
            seed=SEED,
            dtype=dtype,
            compiled=settings.compile,
        )
        for _ in islice(running, steps):
            pass
        running.close()
    return _flat(state.network.parameters())


def _streamed_training(settings: Settings, held: Caches, streamed: Caches) -> dict[str, Any]:
    return _compared(_apart(_trained(settings, streamed, STEPS), _trained(settings, held, STEPS)), REPEATED)


def _resumed(settings: Settings, held: Caches) -> dict[str, Any]:
    half = STEPS // 2
    return _compared(_apart(_trained(settings, held, half, STEPS - half), _trained(settings, held, STEPS)), REPEATED)


def _graphed(settings: Settings, held: Caches) -> dict[str, Any]:
    if settings.device.type != "cuda":
        raise Unmeasurable("CUDA graphs need CUDA")
    graphs = replace(settings, compile="cuda_graphs")
    return _compared(_apart(_trained(graphs, held, STEPS), _trained(settings, held, STEPS)), REPEATED)


@torch.no_grad()
def _strides(settings: Settings) -> dict[str, Any]:
    """Layers of feature maps whose output lies in another memory format than channels-last: the next one copies it."""
    device, left = settings.device, {}
    network = train_step.our_network(settings).eval()

    def check(module: nn.Module, given: tuple, out: Any) -> None:
        is_map = isinstance(out, torch.Tensor) and out.ndim == 4
        if is_map and not out.is_contiguous(memory_format=torch.channels_last):
            left[type(module).__name__] = left.get(type(module).__name__, 0) + 1

    for module in network.modules():
        module.register_forward_hook(check)
    with torch.autocast(device.type, torch.bfloat16):
        network(train_step.latents(BATCH, device), torch.rand(BATCH, device=device), train_step.texts(BATCH, device))
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(left.items()))
    return {"kinds": kinds or "none"} | _compared(float(sum(left.values())), 0.0)
