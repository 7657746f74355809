"""Muon steps along the nearest semi-orthogonal matrix, by as much as AdamW would."""

import pytest
import torch

from latentloom.diffusion.unet import get_network
from latentloom.training.optimizers import MOMENTUM, Muon, build_optimizers
from latentloom.training.orthogonal import orthogonalised


def test_a_step_is_as_large_as_one_of_adamw():
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(32, 16, 3, 3))
    kernel.grad = torch.randn_like(kernel)
    Muon([kernel], lr=0.01).step()
    assert float(kernel.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.2)


def test_kernels_in_one_stack_move_as_each_does_alone():
    """On a GPU those of one shape are updated together."""
    torch.manual_seed(0)
    starts, gradients = torch.randn(3, 8, 4, 3, 3), torch.randn(3, 8, 4, 3, 3)
    together, alone = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    for kernel, other, gradient in zip(together, alone, gradients, strict=True):
        kernel.grad, other.grad = gradient.clone(), gradient.clone()
        Muon([other], lr=0.1).step()
    Muon(together, lr=0.1)._update(together, lr=0.1, weight_decay=0.0)
    for kernel, other in zip(together, alone, strict=True):
        torch.testing.assert_close(kernel, other)


def test_a_step_on_two_cores_gives_the_bytes_of_one_on_one_core():
    """Each kernel is computed on one core; and torch's own number of threads is as before."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            kernels = [torch.randn(*shape) for shape in [(128, 64, 3, 3), (96, 32), (32, 96), (64, 64), (16, 8, 1, 1)]]
            kernels[0] = kernels[0].contiguous(memory_format=torch.channels_last)
            kernels = [torch.nn.Parameter(kernel) for kernel in kernels]
            optimizer = Muon(kernels, lr=0.1)
            for _ in range(2):
                for kernel in kernels:
                    kernel.grad = torch.randn_like(kernel)
                optimizer.step()
            results.append([kernel.detach() for kernel in kernels])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_momentum_is_nesterovs_and_weights_decay():
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 9), torch.randn(2, 6, 9)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    expected, momentum = start.clone(), torch.zeros(6, 9)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        direction = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        step = orthogonalised(direction[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 9**0.5 * step
    torch.testing.assert_close(weight.detach(), expected)


def test_every_weight_has_one_optimizer_and_muon_has_the_kernels_inside(train_params):
    network = get_network(8, 1, 16, 4, widths=(16, 32), text_dim=12)
    muon, adamw = build_optimizers(network, train_params.model_copy(update={"optimizer": "muon"}))
    names = {weight: name for name, weight in network.named_parameters()}
    owned = [
        [names[weight] for group in optimizer.param_groups for weight in group["params"]] for optimizer in (muon, adamw)
    ]
    assert sorted(owned[0] + owned[1]) == sorted(names.values())
    assert {"stem.weight", "head.weight", "head.bias", "head_norm.weight"} <= set(owned[1])
    assert all(network.get_parameter(name).ndim > 1 for name in owned[0])
    decays = {group["weight_decay"] for group in adamw.param_groups if group["params"][0].ndim <= 1}
    assert decays == {0.0}
    assert len(build_optimizers(network, train_params.model_copy(update={"optimizer": "adamw"}))) == 1
