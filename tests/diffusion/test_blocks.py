"""Blocks: shapes, conditioning, attention and the noise embedding against plain calculations."""

import numpy as np
import pytest
import torch
from torch import nn

from latentloom.diffusion import (
    CrossAttention,
    DownBlock,
    ResidualBlock,
    SpatialAttention,
    UpBlock,
    sinusoidal_embedding,
)
from latentloom.diffusion.blocks import SkipConv2d, group_norm


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Take the zeros out of the initialisation, so that every part contributes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05)
    return module


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1, 1)])
@pytest.mark.parametrize("emb_dim", [2, 32])
def test_noise_embedding_is_sines_then_cosines_of_exponentially_spaced_frequencies(shape, emb_dim):
    alpha = np.random.default_rng(0).random(7)
    frequencies = np.exp(np.linspace(0, np.log(1000), emb_dim // 2))
    angles = 2 * np.pi * alpha[:, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    embedded = sinusoidal_embedding(torch.from_numpy(alpha).reshape(shape), emb_dim)
    np.testing.assert_allclose(embedded.numpy(), expected, atol=1e-3)
    assert type(sinusoidal_embedding(alpha, emb_dim)) is np.ndarray


def test_noise_embedding_rejects_an_odd_size():
    with pytest.raises(ValueError, match="even, not 31"):
        sinusoidal_embedding(torch.rand(2), 31)


def test_blocks_that_add_start_by_adding_nothing():
    x, text = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 24)
    for block, arguments in [
        (ResidualBlock(32, 32), ()),
        (ResidualBlock(32, 32, cond_ch=8), (torch.randn(2, 8),)),
        (SpatialAttention(32), ()),
        (CrossAttention(32, 24), (text,)),
    ]:
        torch.testing.assert_close(block(x, *arguments), x, rtol=0, atol=0)


def test_a_residual_block_is_two_normalised_convolutions_modulated_by_its_condition():
    block = randomise(ResidualBlock(16, 48, cond_ch=8)).double()
    x, condition = torch.randn(2, 16, 5, 5).double(), torch.randn(2, 8).double()

    def norm(x, layer):  # by its definition, in groups of neighbouring channels
        grouped = x.reshape(2, layer.num_groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        normed = (centred / (centred.pow(2).mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        return normed * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(x):
        return x / (1 + torch.exp(-x))

    scale, shift = torch.tensor_split(condition @ block.film.weight.T + block.film.bias, 2, dim=1)
    h = norm(block.conv1(silu(norm(x, block.norm1))), block.norm2)
    h = h * (1 + scale[..., None, None]) + shift[..., None, None]
    torch.testing.assert_close(block(x, condition), block.shortcut(x) + block.conv2(silu(h)))


def test_a_convolution_with_a_skip_starts_as_one_of_the_concatenation():
    torch.manual_seed(0)
    whole = nn.Conv2d(8, 7, 3)
    torch.manual_seed(0)
    conv = SkipConv2d(5, 3, 7, 3, upsample=True)
    weight = torch.cat([conv.features.weight, conv.skip.weight], dim=1)
    torch.testing.assert_close(weight, whole.weight, rtol=0, atol=0)
    torch.testing.assert_close(conv.features.bias, whole.bias, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize(("channels", "heads"), [(32, 1), (128, 2)])
def test_attention_is_a_softmax_weighted_mean_of_values(kind, channels, heads):
    x, text = torch.randn(2, channels, 3, 3).double(), torch.randn(2, 5, 24).double()
    if kind == "self":
        block = randomise(SpatialAttention(channels)).double()
        positions = block.norm(x).reshape(2, channels, 9).transpose(1, 2)
        query, key, value = torch.tensor_split(positions @ block.query_key_value.weight.T, 3, dim=2)
        result = block(x)
    else:
        block = randomise(CrossAttention(channels, 24)).double()
        positions = block.norm(x).reshape(2, channels, 9).transpose(1, 2)
        query = positions @ block.query.weight.T
        key, value = torch.tensor_split(text @ block.key_value.weight.T, 2, dim=2)
        result = block(x, text)
    size = channels // heads
    attended = torch.zeros_like(positions)
    for b in range(2):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = torch.exp(query[b, :, part] @ key[b, :, part].T / size**0.5)
            attended[b, :, part] = scores / scores.sum(1, keepdim=True) @ value[b, :, part]
    expected = x + block.out(attended).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(result, expected)


def test_one_text_vector_is_a_sequence_of_one_token():
    block = randomise(CrossAttention(32, 24))
    x, text = torch.randn(2, 32, 4, 4), torch.randn(2, 24)
    torch.testing.assert_close(block(x, text), block(x, text[:, None]))


def test_self_attention_does_not_care_where_a_position_is():
    block = randomise(SpatialAttention(32)).double()
    x = torch.randn(1, 32, 4, 4).double()
    order = torch.randperm(16)
    shuffled = x.flatten(2)[:, :, order].reshape(x.shape)
    torch.testing.assert_close(block(shuffled).flatten(2), block(x).flatten(2)[:, :, order])


@pytest.mark.parametrize("txt_ch", [None, 24])
@pytest.mark.parametrize("self_attention", [True, False])
def test_an_up_block_undoes_the_shapes_of_its_down_block(self_attention, txt_ch):
    down = DownBlock(16, 32, 2, 8, self_attention, txt_ch=txt_ch)
    up = UpBlock(32, 32, 2, 8, self_attention, txt_ch=txt_ch)
    condition, text = torch.randn(3, 8), torch.randn(3, 5, 24)
    x, skips = down(torch.randn(3, 16, 8, 8), condition, text)
    assert x.shape == (3, 32, 4, 4)
    assert [skip.shape for skip in skips] == [(3, 32, 8, 8)] * 2
    assert up(x, skips, condition, text).shape == (3, 32, 8, 8)


def test_blocks_keep_channels_last_memory():
    x = torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    condition, text = torch.randn(2, 8), torch.randn(2, 5, 24)
    down = randomise(DownBlock(64, 64, 1, 8, txt_ch=24))
    halved, skips = down(x, condition, text)
    up = randomise(UpBlock(64, 64, 1, 8, txt_ch=24))(halved, skips, condition, text)
    for result in (halved, *skips, up):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_norm_on_a_gpu_keeps_the_precision_of_its_input_under_autocast_as_one_on_a_cpu_does():
    torch.manual_seed(0)
    layer = group_norm(32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (3 + 2 * torch.randn(4, 32, 8, 8)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        on_cpu, on_gpu = layer(x), layer.in_precision_of_input(x)
    assert on_gpu.dtype is on_cpu.dtype is torch.bfloat16
    exact = nn.functional.group_norm(x.double(), layer.num_groups, layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(on_cpu.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(on_gpu.double(), exact, rtol=2e-2, atol=2e-2)
