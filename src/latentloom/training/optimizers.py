"""The optimizers: AdamW for all weights, or Muon for those inside the network and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel, flattened to a
matrix (out, in*k*k), and steps along the nearest semi-orthogonal matrix, so that every direction moves alike. A step
costs some matrix products more, and gets much further (docs/training.md). `torch.optim.Muon` takes matrices alone, one
by one; here kernels are flattened, and those of one shape go together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from latentloom.params import TrainParams

BETAS = (0.9, 0.99)  # AdamW's
MOMENTUM = 0.95  # Muon's
AT_LATENTS = ("stem.", "head.")  # layers that see a few channels, whose directions are not alike


def build_optimizers(
    network: nn.Module, params: TrainParams, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """What `train.optimizer` names, with a learning rate of 0: each step of a training sets its own.

    Weight decay is for matrices and kernels alone: biases and norms have nothing to shrink to.

    Args:
        network: on the device where it is trained.
        params: the section `train`.
        dtype: what Muon's matrix products compute in.
    """
    muon, kernels, others = [], [], []
    for name, weight in network.named_parameters():
        if weight.ndim < 2:
            others.append(weight)
        elif params.optimizer == "muon" and not name.startswith(AT_LATENTS):
            muon.append(weight)
        else:
            kernels.append(weight)
    groups = [
        {"params": kernels, "weight_decay": params.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = others[0].device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=BETAS, fused=fused)
    if not muon:
        return [adamw]
    return [Muon(muon, lr=0.0, weight_decay=params.weight_decay, dtype=dtype), adamw]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices and kernels.

    Updates are scaled to the size of AdamW's, so one learning rate and one weight decay serve both (Liu et al. 2025,
    "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:  # a network without attention uses no text tokens
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                matrices = torch.stack([self._direction(parameter).reshape(shape[0], -1) for parameter in parameters])
                updates = orthogonalised(matrices, self.dtype).view(-1, *shape)
                rate = group["lr"] * self.scale(*matrices.shape[1:])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates), alpha=-rate)

    def scale(self, rows: int, columns: int) -> float:
        """What the update of a matrix is multiplied by, beside the learning rate: its entries are 0.2 on average."""
        return 0.2 * max(rows, columns) ** 0.5

    def _direction(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(state["momentum"], MOMENTUM)


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.bfloat16, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack `(N, rows, columns)`, roughly: singular values in [0.7, 1.2].

    The quintic Newton-Schulz iteration with Jordan's coefficients, in `dtype`. Matrices of zeros stay.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
