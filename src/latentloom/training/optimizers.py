"""The optimizers: AdamW for all weights, or Muon for those inside the network and AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel, flattened to a
matrix (out, k*k*in), and steps along the nearest semi-orthogonal matrix, so that every direction moves alike. A step
costs some matrix products more, and gets much further (docs/training.md). `torch.optim.Muon` takes matrices alone, one
by one; here kernels are flattened. On a GPU those of one shape go together, since launches cost the most there. On a
CPU each goes by itself, so that one fits into a core's cache, and each core takes another.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
        weight_decay: decoupled, as AdamW's.
        dtype: what the matrix products compute in on an accelerator; on a CPU they are in fp32 whatever it says, see
            `orthogonalised`.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, weight_decay: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        self._cores = ThreadPoolExecutor(torch.get_num_threads())

    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; the gradients are overwritten."""
        for group in self.param_groups:
            # A network without attention uses no text tokens.
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            update = partial(self._update, lr=group["lr"], weight_decay=group["weight_decay"])
            if parameters and parameters[0].device.type == "cpu":
                # The largest first, so that no core waits for it at the end.
                self._one_per_core(update, [[one] for one in sorted(parameters, key=Tensor.numel, reverse=True)])
                continue
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in parameters:
                alike[parameter.shape].append(parameter)
            for stack in alike.values():
                update(stack)

    def _one_per_core(self, update: Callable[[list[Tensor]], None], stacks: list[list[Tensor]]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of each of the threads below
        try:
            for _ in self._cores.map(update, stacks):  # raises what an update raised
                pass
        finally:
            torch.set_num_threads(threads)

    @torch.no_grad()
    def _update(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update parameters of one shape."""
        directions = [self._direction(parameter) for parameter in parameters]
        matrices = [direction.flatten(1) for direction in directions]
        if len(matrices) > 1:
            nearest = orthogonalised(torch.stack(matrices), self.dtype).unbind()
        else:
            nearest = [orthogonalised(matrices[0], self.dtype)]
        rate = lr * self.scale(*matrices[0].shape)
        for parameter, direction, update in zip(parameters, directions, nearest, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(update.view_as(direction).movedim(-1, 1), alpha=-rate)

    def scale(self, rows: int, columns: int) -> float:
        """What the update of a matrix is multiplied by, beside the learning rate: its entries are 0.2 on average."""
        return 0.2 * max(rows, columns) ** 0.5

    def _direction(self, parameter: Tensor) -> Tensor:
        """`(out, k, k, in)`, which is a view of channels-last memory, that of the gradient."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp_(state["momentum"], MOMENTUM).movedim(1, -1)
