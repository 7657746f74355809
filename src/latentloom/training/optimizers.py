"""The optimizers: AdamW for all weights, or Muon for those inside the network and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel, flattened to a
matrix (out, k*k*in), and steps along the nearest semi-orthogonal matrix, so that every direction moves alike. A step
costs some matrix products more, and gets much further (docs/training.md). `torch.optim.Muon` takes matrices alone, one
by one; here kernels are flattened, and those of one shape go together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from latentloom.params import TrainParams
from latentloom.training.orthogonal import orthogonalised

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
        dtype: of Muon's matrix products, see there.
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

    Args:
        params: matrices and kernels, on one device.
        lr: the learning rate.
        weight_decay: decoupled, as AdamW's.
        dtype: what the matrix products compute in on an accelerator; on a CPU they are in fp32 whatever it says, see
            `orthogonalised`.
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
            for parameters in alike.values():
                directions = torch.stack([self._direction(parameter) for parameter in parameters])
                updates = orthogonalised(directions.flatten(2), self.dtype).view_as(directions).movedim(-1, 2)
                rate = group["lr"] * self.scale(len(directions[0]), directions[0, 0].numel())
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates), alpha=-rate)

    def scale(self, rows: int, columns: int) -> float:
        """What the update of a matrix is multiplied by, beside the learning rate: its entries are 0.2 on average."""
        return 0.2 * max(rows, columns) ** 0.5

    def _direction(self, parameter: Tensor) -> Tensor:
        """`(out, k, k, in)`, which is a view of channels-last memory."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(state["momentum"], MOMENTUM).movedim(1, -1)
