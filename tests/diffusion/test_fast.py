"""Layers that are computed in quicker forms than they are described in: against the plain forms, with gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentloom.diffusion import TiledMerge, fast
from latentloom.diffusion.blocks import SkipConv2d


def with_gradients(result: torch.Tensor, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    wanted = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=result.dtype)
    return [result, *torch.autograd.grad(((result - wanted) ** 2).sum(), [*module.parameters(), *inputs])]


def assert_agree(module: nn.Module, plain, *inputs: torch.Tensor) -> None:
    """``module`` and ``plain`` give the same for ``inputs``, and the same gradients of them and of the weights."""
    module, inputs = module.double(), [value.double().requires_grad_() for value in inputs]
    ours = with_gradients(module(*inputs), module, *inputs)
    for found, expected in zip(ours, with_gradients(plain(*inputs), module, *inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("upsample", [False, True])
def test_a_convolution_with_a_skip_is_one_of_the_upsampled_map_concatenated_with_the_skip(upsample, kernel_size):
    conv = SkipConv2d(5, 3, 7, kernel_size, upsample=upsample)

    def plain(x, skip):
        if upsample:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        weight = torch.cat([conv.features.weight, conv.skip.weight], dim=1)
        return F.conv2d(torch.cat([x, skip], dim=1), weight, conv.features.bias, padding=kernel_size // 2)

    size = (8, 12) if upsample else (4, 6)
    assert_agree(conv, plain, torch.randn(2, 5, 4, 6), torch.randn(2, 3, *size))


def test_a_merge_without_tiling_is_a_1x1_convolution_of_the_tiled_concatenation():
    merge = TiledMerge(6, 10, 8)

    def plain(x, condition):
        tiled = condition[:, :, None, None].expand(-1, -1, 5, 5)
        weight = torch.cat([merge.features.weight, merge.condition.weight[:, :, None, None]], dim=1)
        return F.conv2d(torch.cat([x, tiled], dim=1), weight, merge.features.bias)

    assert_agree(merge, plain, torch.randn(3, 6, 5, 5), torch.randn(3, 10))


def test_attention_computed_step_by_step_is_that_of_the_fused_kernel():
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return fast.attention(query, key, value)

    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    assert_agree(Attention(), F.scaled_dot_product_attention, query, key, value)


def test_upsampling_without_the_large_map_saves_five_ninths_of_its_operations():
    conv = nn.Conv2d(32, 16, 3, padding=1)
    counts = []
    for compute in (
        lambda: conv(torch.randn(2, 32, 8, 8)),
        lambda: fast.conv_of_upsampled(torch.randn(2, 32, 4, 4), fast.summed_kernel(conv.weight), conv.bias),
    ):
        with FlopCounterMode(display=False) as counter:
            compute()
        counts.append(counter.get_total_flops())
    assert counts[1] * 9 == counts[0] * 4


@pytest.fixture
def summed(monkeypatch) -> list:
    """The weights whose kernels were summed, in order."""
    calls, compute = [], fast.summed_kernel
    monkeypatch.setattr(
        "latentloom.diffusion.blocks.summed_kernel", lambda weight: calls.append(weight) or compute(weight)
    )
    return calls


@torch.enable_grad()
def fused_step(conv: SkipConv2d) -> None:
    """Of an optimizer that changes weights without counting their versions up."""
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
    conv(torch.randn(2, 5, 4, 4), torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: torch._foreach_lerp_([conv.features.weight], [torch.ones(7, 5, 3, 3)], 0.1),  # the average's own
        fused_step,
        lambda conv: conv.load_state_dict({name: weight + 1 for name, weight in conv.state_dict().items()}),
        lambda conv: conv.double(),
    ],
    ids=["average", "optimizer", "loading", "precision"],
)
def test_sampling_sums_kernels_once_and_anew_when_weights_have_changed(summed, change):
    conv = SkipConv2d(5, 3, 7, 3, upsample=True)
    x, skip = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        first = conv(x, skip)
        assert torch.equal(conv(x, skip), first)
        assert len(summed) == 1
        change(conv)
        x, skip = x.to(conv.skip.weight), skip.to(conv.skip.weight)
        changed = conv(x, skip)
    assert torch.equal(changed, conv(x, skip))  # with gradients, where nothing is kept
    assert not torch.equal(changed, first)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_kept_kernel_is_no_weight_and_stays_out_of_training(summed, context):
    conv = SkipConv2d(5, 3, 7, 3, upsample=True)
    x, skip = torch.randn(2, 5, 4, 4), torch.randn(2, 3, 8, 8)
    names = set(conv.state_dict())
    with context():
        conv(x, skip)
    assert set(conv.state_dict()) == names
    conv(x, skip).sum().backward()
    assert conv.features.weight.grad.abs().sum() > 0
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.features.weight.zero_()
        assert not torch.equal(twin(x, skip), conv(x, skip))
