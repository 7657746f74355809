"""A step reads no number off the device, and with the network's passes as CUDA graphs it is the same step.

There is no CUDA here: a stand-in replays as torch's graphs do, on memory that stays where it is. And on the device
`meta`, where tensors have no values, whatever needs one raises: `.item()`, `.cpu()`, a mask as an index.
"""

from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from latentloom.diffusion.unet import get_network
from latentloom.encoding.row_sources import InMemoryRows
from latentloom.training import batches
from latentloom.training.loop import TrainingState, train

META = torch.device("meta")


def network():
    torch.manual_seed(0)
    return get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12, token_dim=10).to(memory_format=torch.channels_last)


def graphed(module, sample_args, allow_unused_input):
    """As `torch.cuda.make_graphed_callables`: inputs, output and gradients are in the same memory at every call."""
    assert module.training and not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    forward, parameters = module.forward, tuple(module.parameters())
    inputs, structure = tree_leaves(sample_args), tree_structure(sample_args)
    assert all(isinstance(tensor, torch.Tensor) for tensor in inputs)
    memory, calls, cast = {}, [], (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for own, tensor in zip(inputs, given, strict=False):
                assert own.shape == tensor.shape and own.dtype == tensor.dtype
                own.copy_(tensor)
            with torch.enable_grad(), torch.autocast("cpu", cast[1], cast[0], cache_enabled=False):
                memory["computed"] = forward(*tree_unflatten(inputs, structure))
            memory["output"] = memory.get("output", torch.empty_like(memory["computed"])).copy_(memory["computed"])
            return memory["output"].detach()

        @staticmethod
        def backward(ctx, flowing):
            computed = torch.autograd.grad(memory["computed"], parameters, flowing, allow_unused=allow_unused_input)
            own = memory.setdefault("gradients", [torch.empty_like(gradient) for gradient in computed])
            for static, gradient in zip(own, computed, strict=True):
                static.copy_(gradient)
            return *[None] * len(inputs), *(static.detach() for static in own)

    def replay(*arguments):
        if not module.training:
            return forward(*arguments)
        calls.append(1)
        return Replayed.apply(*tree_leaves(arguments), *parameters)

    module.forward, module.calls = replay, calls
    return module


@pytest.mark.parametrize(("parts", "dtype"), [(1, None), (2, torch.bfloat16)])
def test_with_the_networks_passes_as_graphs_a_training_ends_at_the_same_weights(
    make_data, train_params, diffusion_params, monkeypatch, parts, dtype
):
    monkeypatch.setattr("torch.cuda.make_graphed_callables", graphed)
    params = train_params.model_copy(update={"steps": 3, "gradient_accumulation": parts})
    plain, recorded = (TrainingState.start(network(), params, dtype) for _ in range(2))
    for state, compiled in ((plain, False), (recorded, "cuda_graphs")):
        steps = train(
            state,
            make_data(8, tokens=True),
            params=params,
            diffusion=diffusion_params,
            seed=0,
            dtype=dtype,
            compiled=compiled,
        )
        assert len(list(steps)) == 3
    assert len(recorded.network.calls) == 3 * parts
    for name, tensor in plain.tensors().items():
        assert torch.equal(recorded.tensors()[name], tensor), name


def without_values(rows: InMemoryRows) -> InMemoryRows:
    moved = copy(rows)
    moved.device = META
    moved._tensors = {name: tensor.to(META) for name, tensor in rows._tensors.items()}
    moved._ragged = {name: tuple(tensor.to(META) for tensor in own) for name, own in rows._ragged.items()}
    return moved


def test_a_step_waits_for_no_value_of_the_device(make_data, train_params, diffusion_params, monkeypatch):
    # Such a device has neither generators nor autocast, and no lists of tensors are clipped at once.
    monkeypatch.setattr(batches, "generator", lambda device, *parts: None)
    monkeypatch.setattr(torch, "autocast", lambda *settings, **more: nullcontext())
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda weights, norm, foreach: clip(weights, norm))
    data = make_data(8, std=True, flipped=True, tokens=True)
    data = replace(
        data,
        latents=without_values(data.latents),
        text=without_values(data.text),
    )
    params = train_params.model_copy(update={"steps": 2, "gradient_accumulation": 2, "optimizer": "muon"})
    alone = SimpleNamespace(
        process_index=0,
        num_processes=1,
        prepare_model=lambda network: network,
        no_sync=lambda network: nullcontext(),
        backward=torch.Tensor.backward,
    )
    state = TrainingState.start(network().to(META), params)
    steps = list(train(state, data, params=params, diffusion=diffusion_params, seed=0, accelerator=alone))
    assert [step.step for step in steps] == [1, 2]
    with pytest.raises(RuntimeError, match="meta"):
        steps[0].loss.item()
