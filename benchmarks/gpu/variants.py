"""Ways to compute the same training step: settings of the device, other norms, CUDA graphs.

The settings are contexts that set back what they changed. `as_graph` captures the whole step, so that the host starts
one graph where it starts some 1,650 kernels else; only drawing the batch stays outside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import train_step
from torch import nn
from torch.nn import functional as F

from latentloom.devices import autocast
from latentloom.diffusion import get_schedule
from latentloom.diffusion.blocks import GroupNorm, SkipConv2d
from latentloom.training.batches import Batch, batches
from latentloom.training.loop import TrainingState, losses

WARM_UP = 3  # steps before a capture, in which libraries choose kernels and allocate what they keep


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of fp32 with 10 bits of mantissa, or all 23."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN tries its algorithms for each new shape, instead of choosing by rule."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Convolutions of the upsampled map concatenated with its skip, computed as they are described."""

    def forward(conv: SkipConv2d, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        if conv.upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        weight = torch.cat([conv.features.weight, conv.skip.weight], dim=1)
        return F.conv2d(torch.cat([x, skip], dim=1), weight, conv.features.bias, padding=conv.features.padding)

    before = SkipConv2d.forward
    SkipConv2d.forward = forward
    try:
        yield
    finally:
        SkipConv2d.forward = before


@contextmanager
def norms(forward: Callable[[nn.GroupNorm, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Group norms computed by ``forward``; that of torch, under autocast on CUDA, casts their input to fp32."""
    before = GroupNorm.forward
    GroupNorm.forward = forward
    try:
        yield
    finally:
        GroupNorm.forward = before


def norm_in_channels_last(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    """Group norm from sums and one multiplication, which keep channels-last memory: torch's CUDA kernel leaves it.

    `(B, C, H, W)`; mean and variance are computed in fp32, the result has the dtype of ``x``.
    """
    groups = norm.num_groups
    with torch.autocast(x.device.type, enabled=False):
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (groups, -1))  # (B, H W, G, C/G), a view
        count = tokens.shape[1] * tokens.shape[3]
        mean = tokens.mean((1, 3), keepdim=True, dtype=torch.float32)
        square = torch.linalg.vector_norm(tokens, dim=(1, 3), keepdim=True, dtype=torch.float32).square() / count
        inverse = torch.rsqrt((square - mean.square()).clamp_min(0.0) + norm.eps)
        scale = inverse * norm.weight.float().view(groups, -1)
        shift = norm.bias.float().view(groups, -1) - mean * scale
        out = torch.addcmul(shift.to(x.dtype), tokens, scale.to(x.dtype))
        return out.flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class StaticStep:
    """A step of ours on tensors that stay where they are, as a CUDA graph needs it.

    `load` copies the next batch into them, drawn as a training draws it; `compute` does all the rest: noise, network,
    loss, backward, clip, optimizers, average.
    """

    def __init__(self, settings: train_step.Settings) -> None:
        self.settings = settings
        self.params, diffusion = train_step.our_params(settings)
        self.state = TrainingState.start(train_step.our_network(settings).train(), self.params, settings.dtype)
        for optimizer in self.state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.params.learning_rate
                if settings.device.type == "cuda" and "capturable" in group:  # torch's own, which count steps
                    group["capturable"], group["lr"] = True, torch.tensor(group["lr"], device=settings.device)
        self.schedule = get_schedule(diffusion.schedule)
        self._drawn = batches(
            train_step.synthetic_data(settings),
            seed=0,
            steps=range(10**9),
            batch_size=settings.batch,
            block_rows=None,
            distribution=diffusion.noise_levels,
            label_dropout=diffusion.label_dropout,
            parts=[slice(0, settings.batch)],
        )
        (first,) = next(self._drawn)
        self.batch = Batch(*(tensor.clone() for tensor in first))

    def load(self) -> None:
        (following,) = next(self._drawn)
        for static, tensor in zip(self.batch, following, strict=True):
            static.copy_(tensor)

    def compute(self) -> torch.Tensor:
        """The loss (), on the device."""
        batch, network = self.batch, self.state.network
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.noise_levels)
        with autocast(self.settings.dtype, self.settings.device):
            predicted = network(noisy, batch.noise_levels, batch.labels)
        loss, _ = losses(predicted.float(), batch.latents, self.params)
        loss.backward()
        weights = list(network.parameters())
        nn.utils.clip_grad_norm_(weights, self.params.gradient_clip, foreach=True)
        for optimizer in self.state.optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.state.average.parameters()), weights, 0.01)
        return loss.detach()

    def zero_grad(self) -> None:
        for optimizer in self.state.optimizers:
            optimizer.zero_grad()

    def run(self) -> torch.Tensor:
        """A step without a graph."""
        self.zero_grad()
        self.load()
        return self.compute()


def as_graph(step: StaticStep) -> Callable[[], torch.Tensor]:
    """What runs ``step`` as one CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step.run()
    torch.cuda.current_stream().wait_stream(aside)
    step.zero_grad()  # so that the gradients are in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step.compute()

    def run() -> torch.Tensor:
        step.load()
        graph.replay()
        return loss

    return run
