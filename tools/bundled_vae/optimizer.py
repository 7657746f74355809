"""Muon for the convolution kernels, AdamW for all else.

Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel, flattened to
a matrix (out, in*k*k), and steps along the nearest semi-orthogonal matrix, so that every direction moves alike.
For a short training of plain convolutions that is worth far more than its few matrix products.
Kernels of one shape are orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack `(N, rows, columns)`, roughly: singular values in [0.7, 1.2].

    The quintic Newton-Schulz iteration with Jordan's coefficients, in bfloat16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for kernels and matrices; the learning rate is a step's spectral norm, about."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                alike[parameter.shape].append((parameter, direction))
            for shape, pairs in alike.items():
                directions = torch.stack([direction.reshape(shape[0], -1) for _, direction in pairs])
                rows, columns = directions.shape[-2:]
                for (parameter, _), update in zip(pairs, orthogonalised(directions), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def build_optimizers(
    network: torch.nn.Module, muon_rate: float, adam_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for kernels inside the network, AdamW for biases and for the kernels at pixels and latents."""
    inner, outer = [], []
    for parameter in network.parameters():
        narrow = parameter.ndim < 4 or min(parameter.shape[:2]) <= 4
        (outer if narrow else inner).append(parameter)
    return [
        Muon(inner, lr=muon_rate, weight_decay=weight_decay),
        torch.optim.AdamW(outer, lr=adam_rate, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True),
    ]
