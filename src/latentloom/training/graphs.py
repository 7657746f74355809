"""The network's forward and backward pass as one CUDA graph each, which the host starts as a whole.

Else it starts some 1,500 kernels one by one, and a GPU that is done with a small batch sooner waits for it. A graph
repeats its kernels on the same memory: inputs are copied there, so all batches have the shape of the first, and data of
several shapes are rejected (`training.run`). What stays outside (drawing the batch, clipping, the optimizers, the
average) is done for all weights at once, in few kernels; so learning rates and step counts remain plain numbers, and
several processes can average the gradients.
"""

import torch
from torch import nn
from torch.utils._pytree import register_pytree_node

from latentloom.diffusion.text import Text
from latentloom.training.batches import Batch

# How the tensors of a `Text` are found among a graph's inputs.
register_pytree_node(
    Text, lambda text: ([text.pooled, text.tokens, text.mask], None), lambda tensors, _: Text(*tensors)
)


def use_graphs(network: nn.Module, example: Batch, dtype: torch.dtype | None) -> None:
    """Record the passes of ``network``, which is in training mode and on CUDA, and replay them from then on.

    Evaluation is as before. A backward pass leaves the gradients in memory that the next one overwrites, and autograd
    makes that memory the gradient of a weight that has none. The tensors of ``example`` become the graph's inputs.
    """
    # Without its cache: weights that autocast had cast before the recording would be no part of the graph.
    device, enabled = example.latents.device.type, dtype is not None
    with torch.autocast(device, dtype or torch.bfloat16, enabled, cache_enabled=False):
        torch.cuda.make_graphed_callables(
            network,
            (example.latents, example.noise_levels, example.labels),
            allow_unused_input=True,  # a network without attention uses no text tokens
        )
