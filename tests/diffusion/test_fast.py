"""The fast forms of layers against their plain forms, which `blocks` and `unet` describe: values and gradients."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentloom.diffusion import TiledMerge, UNet, fast
from latentloom.diffusion.blocks import CrossAttention, SkipConv2d, SpatialAttention


def outputs_and_gradients(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [value.clone().requires_grad_() for value in inputs]
    result = module(*inputs)
    wanted = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=result.dtype)
    return [result, *torch.autograd.grad(((result - wanted) ** 2).sum(), [*module.parameters(), *inputs])]


def assert_both_forms_agree(monkeypatch, module: nn.Module, *inputs: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():  # past the zeros of the initialisation
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    module, inputs = module.double(), [value.double() for value in inputs]
    found = outputs_and_gradients(module, *inputs)
    monkeypatch.setattr(fast, "ENABLED", False)
    for ours, plain in zip(found, outputs_and_gradients(module, *inputs), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("upsample", [False, True])
def test_a_convolution_with_a_skip_is_one_of_the_upsampled_map_concatenated_with_the_skip(
    monkeypatch, upsample, kernel_size
):
    skip = torch.randn(2, 3, 8, 12) if upsample else torch.randn(2, 3, 4, 6)
    conv = SkipConv2d(5, 3, 7, kernel_size, upsample=upsample)
    assert_both_forms_agree(monkeypatch, conv, torch.randn(2, 5, 4, 6), skip)


def test_a_merge_without_tiling_is_a_1x1_convolution_of_the_tiled_concatenation(monkeypatch):
    assert_both_forms_agree(monkeypatch, TiledMerge(6, 10, 8), torch.randn(3, 6, 5, 5), torch.randn(3, 10))


def test_attention_computed_step_by_step_is_that_of_the_fused_kernel(monkeypatch):
    assert_both_forms_agree(monkeypatch, SpatialAttention(32, heads=4), torch.randn(2, 32, 3, 3))
    monkeypatch.undo()
    assert_both_forms_agree(
        monkeypatch, CrossAttention(32, 24, heads=2), torch.randn(2, 32, 3, 3), torch.randn(2, 5, 24)
    )


def test_a_whole_network_is_the_same_function_in_both_forms(monkeypatch):
    network = UNet(4, (16, 32, 32), 2, 16, 24)
    assert_both_forms_agree(monkeypatch, network, torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 24))


def test_upsampling_without_the_large_map_saves_five_ninths_of_its_operations():
    conv = nn.Conv2d(32, 16, 3, padding=1)
    counts = []
    for compute in (
        lambda: conv(torch.randn(2, 32, 8, 8)),
        lambda: fast.conv_of_upsampled(torch.randn(2, 32, 4, 4), conv.weight, conv.bias),
    ):
        with FlopCounterMode(display=False) as counter:
            compute()
        counts.append(counter.get_total_flops())
    assert counts[1] * 9 == counts[0] * 4
