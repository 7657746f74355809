"""The parts that a denoiser is built from, each usable alone.

Feature maps are `(B, C, H, W)` tensors in channels-last memory, where a map's positions are a sequence of
tokens `(B, H W, C)` without a copy: convolutions and attention then share the memory. Every part that adds to
a feature map starts by adding nothing (its last layer is zero), so a deep stack begins as a shallow one
(Goyal et al. 2017).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from latentloom.diffusion.fast import attention, conv_of_upsampled, summed_kernel


def _zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GroupNorm(nn.GroupNorm):
    """In the precision of its input, under autocast too; the sums within are in float32 anyhow.

    A CPU has it so. On CUDA autocast would cast the input to float32, and everything up to the next convolution would
    then move twice the memory.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.device.type == "cpu" else self.in_precision_of_input(x)

    def in_precision_of_input(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels: int) -> GroupNorm:
    """At most 32 groups, of at least 16 channels where that divides.

    Wu & He 2018 found groups of 16 channels no worse than 32 groups. Smaller groups are up to ten times
    slower in bfloat16 on a CPU, where a group then fills no vector register.
    """
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < 16:
        groups //= 2
    return GroupNorm(groups, channels)


def _to_tokens(x: torch.Tensor) -> torch.Tensor:
    """`(B, C, H, W)` -> `(B, H W, C)`: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B, H W, C)` -> `(B, C, H, W)` in channels-last memory: a view again."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def split_heads(tokens: torch.Tensor) -> torch.Tensor:
    """`(B, N, C)` -> `(B, heads, N, C / heads)`: heads of 64 channels, or one where that does not divide."""
    channels = tokens.shape[2]
    return tokens.unflatten(2, (1 if channels % 64 else channels // 64, -1)).transpose(1, 2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of `(B, N, C)` queries over `(B, T, C)` keys and values, those that `mask` `(B, T)` shows."""
    return attention(*map(split_heads, (query, key, value)), mask).transpose(1, 2).flatten(2)


class Tokens(NamedTuple):
    """Text for cross-attention: states `(B, T, txt_ch)` of which `mask` `(B, T)`, bool, shows at least one each."""

    states: torch.Tensor
    mask: torch.Tensor


class SkipConv2d(nn.Module):
    """A convolution of a feature map concatenated with a skip: the sum of a convolution of each.

    `(B, in_ch, H, W)` and a skip `(B, skip_ch, H, W)` -> `(B, out_ch, H, W)`. With `upsample` the feature map has half
    the skip's height and width, and is made as large by nearest neighbours; being a part of its own, it is worked on
    while it is small. The weights of both start as the parts of one convolution.
    """

    _kept: tuple[tuple, torch.Tensor] | None = None  # a summed kernel, and what it was made of

    def __init__(self, in_ch: int, skip_ch: int, out_ch: int, kernel_size: int, *, upsample: bool = False):
        super().__init__()
        self.upsample = upsample
        padding = kernel_size // 2
        whole = nn.Conv2d(in_ch + skip_ch, out_ch, kernel_size)
        self.features = nn.Conv2d(in_ch, out_ch, kernel_size, padding=padding)
        self.skip = nn.Conv2d(skip_ch, out_ch, kernel_size, padding=padding, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(whole.weight[:, :in_ch])
            self.features.bias.copy_(whole.bias)
            self.skip.weight.copy_(whole.weight[:, in_ch:])

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        if not self.upsample:
            x = self.features(x)
        elif self.features.kernel_size == (3, 3):
            x = conv_of_upsampled(x, self._summed_kernel(), self.features.bias)
        else:  # a 1x1 convolution and nearest neighbours commute
            x = F.interpolate(self.features(x), scale_factor=2.0, mode="nearest")
        return x + self.skip(skip)

    def _summed_kernel(self) -> torch.Tensor:
        """Kept while only sampling asks for it: a tenth of a step with one image on a CPU.

        Changes of the weight in place count its version up, but for a fused optimizer's, which follow a forward pass
        with gradients.
        """
        weight = self.features.weight
        if torch.compiler.is_compiling() or weight.is_inference():
            return summed_kernel(weight)
        if torch.is_grad_enabled():
            self._kept = None
            return summed_kernel(weight)
        made_of = (weight.data_ptr(), weight._version, weight.dtype)
        if self._kept is None or self._kept[0] != made_of:
            self._kept = made_of, summed_kernel(weight)
        return self._kept[1]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: `(B, in_ch, H, W)` -> `(B, out_ch, H, W)`.

    With `cond_ch`, a conditioning vector `(B, cond_ch)` scales and shifts the normalised features between the
    convolutions (FiLM, Perez et al. 2018; adaptive group norm in Dhariwal & Nichol 2021). With `skip_ch`, the input is
    concatenated with a skip `(B, skip_ch, H, W)`, each normalised by itself; with `upsample`, the input is half as
    high and wide as the skip and the output.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        *,
        cond_ch: int | None = None,
        skip_ch: int | None = None,
        upsample: bool = False,
    ):
        super().__init__()
        self.norm1 = group_norm(in_ch)
        if skip_ch:
            self.skip_norm = group_norm(skip_ch)
            self.conv1 = SkipConv2d(in_ch, skip_ch, out_ch, 3, upsample=upsample)
            self.shortcut = SkipConv2d(in_ch, skip_ch, out_ch, 1, upsample=upsample)
        else:
            self.skip_norm = None
            self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
            self.shortcut = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.film = nn.Linear(cond_ch, 2 * out_ch) if cond_ch else None
        self.norm2 = group_norm(out_ch)
        self.conv2 = _zero(nn.Conv2d(out_ch, out_ch, 3, padding=1))

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = F.silu(self.norm1(x))
        if self.skip_norm is None:
            h, shortcut = self.conv1(h), self.shortcut(x)
        else:
            h, shortcut = self.conv1(h, F.silu(self.skip_norm(skip))), self.shortcut(x, skip)
        h = self.norm2(h)
        if self.film is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return shortcut + self.conv2(F.silu(h))


class SpatialAttention(nn.Module):
    """Self-attention over the positions of a feature map `(B, ch, H, W)`, added to it.

    Queries and keys have no bias: softmax ignores what a key bias adds.
    """

    def __init__(self, ch: int):
        super().__init__()
        self.norm = group_norm(ch)
        self.query_key_value = nn.Linear(ch, 3 * ch, bias=False)
        self.out = _zero(nn.Linear(ch, ch))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query_key_value(_to_tokens(self.norm(x))).chunk(3, dim=2)
        return x + _to_map(self.out(_attend(query, key, value)), x)


class CrossAttention(nn.Module):
    """Attention of the positions of a feature map `(B, img_ch, H, W)` over text, added to the map.

    The text is tokens `(B, T, txt_ch)`, all of them seen, or `Tokens` with a mask; or one vector `(B, txt_ch)`. Over a
    single vector attention has nothing to choose from (its one weight is 1), so give several tokens where you can.
    """

    def __init__(self, img_ch: int, txt_ch: int):
        super().__init__()
        self.norm = group_norm(img_ch)
        self.query = nn.Linear(img_ch, img_ch, bias=False)
        self.key_value = nn.Linear(txt_ch, 2 * img_ch, bias=False)
        self.out = _zero(nn.Linear(img_ch, img_ch))

    def forward(self, x: torch.Tensor, text: torch.Tensor | Tokens) -> torch.Tensor:
        states, mask = text if isinstance(text, Tokens) else (text, None)
        if states.ndim == 2:
            states = states[:, None]
        key, value = self.key_value(states).chunk(2, dim=2)
        query = self.query(_to_tokens(self.norm(x)))
        return x + _to_map(self.out(_attend(query, key, value, mask)), x)


class ConditionedLayer(nn.Module):
    """One layer of a U-Net: a residual block, then self-attention, then cross-attention, where asked for.

    Where `checkpointed` is set, training keeps the layer's inputs alone and computes the rest once more on the
    way back (Chen et al. 2016): less memory, more time, the same gradients.
    """

    checkpointed = False

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        cond_ch: int | None,
        use_self_attention: bool,
        *,
        txt_ch: int | None = None,
        skip_ch: int | None = None,
        upsample: bool = False,
    ):
        super().__init__()
        self.residual = ResidualBlock(in_ch, out_ch, cond_ch=cond_ch, skip_ch=skip_ch, upsample=upsample)
        self.self_attention = SpatialAttention(out_ch) if use_self_attention else None
        self.cross_attention = CrossAttention(out_ch, txt_ch) if txt_ch else None

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor | None = None,
        text: torch.Tensor | Tokens | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.checkpointed and self.training and torch.is_grad_enabled():
            # Nothing in a layer is random, so there is no random state to bring back.
            return checkpoint(self._compute, x, condition, text, skip, use_reentrant=False, preserve_rng_state=False)
        return self._compute(x, condition, text, skip)

    def _compute(
        self,
        x: torch.Tensor,
        condition: torch.Tensor | None,
        text: torch.Tensor | Tokens | None,
        skip: torch.Tensor | None,
    ) -> torch.Tensor:
        x = self.residual(x, condition, skip)
        if self.self_attention is not None:
            x = self.self_attention(x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, text)
        return x


class DownBlock(nn.Module):
    """`block_depth` layers, then half the resolution: `(B, in_ch, H, W)` -> `(B, out_ch, H/2, W/2)`, skips.

    `forward` returns `(x, skips)`, one skip `(B, out_ch, H, W)` per layer. With `txt_ch`, text enters by
    cross-attention. `downsample=False` keeps the resolution (the deepest level has nowhere to go).
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        block_depth: int,
        cond_ch: int | None,
        use_self_attention: bool = True,
        *,
        txt_ch: int | None = None,
        downsample: bool = True,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionedLayer(in_ch if i == 0 else out_ch, out_ch, cond_ch, use_self_attention, txt_ch=txt_ch)
            for i in range(block_depth)
        )
        self.downsample = nn.Conv2d(out_ch, out_ch, 3, stride=2, padding=1) if downsample else None

    def forward(
        self, x: torch.Tensor, condition: torch.Tensor | None = None, text: torch.Tensor | Tokens | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips = []
        for layer in self.layers:
            x = layer(x, condition, text)
            skips.append(x)
        return (x if self.downsample is None else self.downsample(x)), skips


class UpBlock(nn.Module):
    """The mirror of `DownBlock`: `block_depth` layers at twice the resolution, each fed a skip as well.

    `(B, in_ch, H/2, W/2)` and skips `(B, out_ch, H, W)` -> `(B, out_ch, H, W)`. The skips come in the order in which
    `DownBlock` made them and are used from the last.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        block_depth: int,
        cond_ch: int | None,
        use_self_attention: bool = True,
        *,
        txt_ch: int | None = None,
        upsample: bool = True,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionedLayer(
                in_ch if i == 0 else out_ch,
                out_ch,
                cond_ch,
                use_self_attention,
                txt_ch=txt_ch,
                skip_ch=out_ch,
                upsample=upsample and i == 0,
            )
            for i in range(block_depth)
        )

    def forward(
        self,
        x: torch.Tensor,
        skips: list[torch.Tensor],
        condition: torch.Tensor | None = None,
        text: torch.Tensor | Tokens | None = None,
    ) -> torch.Tensor:
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            x = layer(x, condition, text, skip)
        return x
