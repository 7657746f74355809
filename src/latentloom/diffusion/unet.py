"""The denoiser: a U-Net that sees a noised latent, a noise level and a text, and predicts the clean latent.

    x_t ------------------------ 3x3 conv --- merge --- DownBlocks --- middle --- UpBlocks --- head --> x0_hat
    noise level -- 32 sinusoids --.             |           |            |           |
    text embedding --- linear ----'- condition -'-- FiLM ---+------------+-----------'
                   '-- linear --- 8 tokens ---.----- cross-attention, at all levels but the finest
    token states ------ linear --- T tokens --'

The token states are optional, see `Text`: one vector can hardly say which word belongs to which part of a picture.
A network for several sizes is told that of `x_t`, added to the projected text: nothing else in it depends on a size.

The condition enters twice. Merged into the input, it reaches every position once; and by FiLM it rescales the
features of every residual block, since what a layer should do depends on the noise level: find the large
shapes when there is much noise, leave the latent alone when there is hardly any. A merged input would have to
survive every normalisation on the way to say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from latentloom.diffusion.blocks import ConditionedLayer, DownBlock, Tokens, UpBlock, group_norm
from latentloom.diffusion.embeddings import NoiseEmbedding, SizeEmbedding, TextWhitening
from latentloom.diffusion.text import Labels, Text, pooled

NOISE_EMB_DIM = 32  # of the noise-level embedding
TEXT_TOKENS = 8  # that the text embedding is spread over for cross-attention


class TiledMerge(nn.Module):
    """Tile a vector `(B, cond_ch)` over a feature map, concatenate, merge by a 1x1 convolution.

    It is computed as the sum of two parts, since a 1x1 convolution of a map that is the same everywhere is one vector.
    The weights start as the parts of one convolution.
    """

    def __init__(self, in_ch: int, cond_ch: int, out_ch: int):
        super().__init__()
        whole = nn.Conv2d(in_ch + cond_ch, out_ch, 1)
        self.features = nn.Conv2d(in_ch, out_ch, 1)
        self.condition = nn.Linear(cond_ch, out_ch, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(whole.weight[:, :in_ch])
            self.features.bias.copy_(whole.bias)
            self.condition.weight.copy_(whole.weight[:, in_ch:, 0, 0])

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return self.features(x) + self.condition(condition)[:, :, None, None]


class UNet(nn.Module):
    """Predicts the clean latent `x0_hat` from a noised one.

    latent_channels:  channels C of the latent.
    widths:           channels at each level; every level but the last halves the resolution.
    block_depth:      layers per level, down and up.
    emb_size:         size of the projected text, of the conditioning vector and of a text token.
    text_dim:         size of the text embedding that the encoder gives.
    token_dim:        size of the token states that the encoder gives; None: the network reads the embedding alone.
    size_condition:   whether the network is told the size of `x_t`. At first that changes nothing.

    The layers of all levels but the finest, where it costs the most, have self- and cross-attention.
    `gradient_checkpointing`, False unless set, trades time for memory in training (see `ConditionedLayer`); it changes
    no result.
    """

    def __init__(
        self,
        latent_channels: int = 4,
        widths: Sequence[int] = (128, 256, 512),
        block_depth: int = 2,
        emb_size: int = 256,
        text_dim: int = 512,
        token_dim: int | None = None,
        size_condition: bool = False,
    ):
        super().__init__()
        if not widths or min(*widths, latent_channels, block_depth, emb_size, text_dim, token_dim or 1) < 1:
            raise ValueError(
                "a UNet needs at least one width, and no size below 1; given were "
                f"{latent_channels=}, {widths=}, {block_depth=}, {emb_size=}, {text_dim=}, {token_dim=}"
            )
        self.latent_channels = latent_channels
        self.text_dim, self.token_dim = text_dim, token_dim
        self.halvings = len(widths) - 1

        self.noise_embedding = NoiseEmbedding(NOISE_EMB_DIM)
        self.text_whitening = TextWhitening(text_dim)
        self.text_projection = nn.Linear(text_dim, emb_size)
        self.text_tokens = nn.Sequential(
            nn.Linear(text_dim, TEXT_TOKENS * emb_size), nn.Unflatten(1, (TEXT_TOKENS, -1))
        )
        self.token_whitening = TextWhitening(token_dim) if token_dim else None
        self.token_projection = nn.Linear(token_dim, emb_size) if token_dim else None
        self.condition = nn.Sequential(
            nn.Linear(NOISE_EMB_DIM + emb_size, emb_size), nn.SiLU(), nn.Linear(emb_size, emb_size), nn.SiLU()
        )
        self.stem = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.merge = TiledMerge(widths[0], NOISE_EMB_DIM + emb_size, widths[0])

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            finer, coarser = widths[max(level - 1, 0)], widths[min(level + 1, self.halvings)]
            attends, resample = level > 0, level < self.halvings
            txt_ch = emb_size if attends else None
            down = DownBlock(finer, width, block_depth, emb_size, attends, txt_ch=txt_ch, downsample=resample)
            up = UpBlock(coarser, width, block_depth, emb_size, attends, txt_ch=txt_ch, upsample=resample)
            self.downs.append(down)
            self.ups.insert(0, up)
        self.middle = nn.ModuleList(
            [
                ConditionedLayer(width, width, emb_size, attends, txt_ch=txt_ch),  # as the deepest level
                ConditionedLayer(width, width, emb_size, use_self_attention=False),
            ]
        )
        self.head_norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], latent_channels, 3, padding=1)
        # The first prediction is near the mean latent, yet not 0, so that gradients pass from the first step on.
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()
        # Last, so that all other weights start as they would without it.
        self.size_embedding = SizeEmbedding() if size_condition else None
        self.size_projection = nn.Linear(SizeEmbedding.dim, emb_size, bias=False) if size_condition else None
        if self.size_projection is not None:
            nn.init.zeros_(self.size_projection.weight)

    @property
    def multiple(self) -> int:
        """What the sides of a latent must be multiples of."""
        return 2**self.halvings

    @property
    def gradient_checkpointing(self) -> bool:
        return all(layer.checkpointed for layer in self._layers())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for layer in self._layers():
            layer.checkpointed = value

    def _layers(self) -> Iterator[ConditionedLayer]:
        return (module for module in self.modules() if isinstance(module, ConditionedLayer))

    def forward(self, x_t: torch.Tensor, noise_levels: torch.Tensor, text_embeddings: Labels) -> torch.Tensor:
        """Predict the clean latents from noised ones.

        `x_t` `(B, C, H, W)`; `noise_levels` in [0, 1], `(B,)`, `(B, 1)` or `(B, 1, 1, 1)`, or one for all;
        `text_embeddings` `(B, text_dim)`, or a `Text` of these and token states, which a network with `token_dim` needs
        and one without does not look at.

        Returns `x0_hat` `(B, C, H, W)` in float32 or better, under autocast too. A text embedding of zeros (without
        tokens that are seen) is "no text".
        """
        self._check_shapes(x_t, noise_levels, text_embeddings)
        dtype = self.head.weight.dtype
        text = self.text_whitening(pooled(text_embeddings))
        noise = self.noise_embedding(noise_levels).expand(x_t.shape[0], -1)
        told = self.text_projection(text)
        if self.size_projection is not None:
            told = told + self.size_projection(self.size_embedding(*x_t.shape[2:]))
        embedding = torch.cat([noise, told], dim=1)
        condition, tokens = self.condition(embedding), self._tokens(text, text_embeddings)

        h = self.stem(x_t.to(dtype).contiguous(memory_format=torch.channels_last))
        h = self.merge(h, embedding)
        skips = []
        for down in self.downs:
            h, kept = down(h, condition, tokens)
            skips.append(kept)
        for layer in self.middle:
            h = layer(h, condition, tokens)
        for up in self.ups:
            h = up(h, skips.pop(), condition, tokens)
        h = F.silu(self.head_norm(h))
        with torch.autocast(x_t.device.type, enabled=False):  # the prediction itself keeps all its digits
            return self.head(h.to(dtype))

    def check_sides(self, height: int, width: int) -> None:
        """Raise `ValueError` where a latent cannot be halved as often as this network does."""
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"this UNet halves the latent {self.halvings} times, so its sides must be multiples of "
                f"{self.multiple}, not {height}x{width}"
            )

    def _tokens(self, text: torch.Tensor, labels: Labels) -> torch.Tensor | Tokens:
        """What cross-attention sees: tokens made of the whitened vector, and those of the caption beside them.

        The first are always seen, so there is something to attend to without text too: their biases.
        """
        tokens = self.text_tokens(text)
        if self.token_dim is None:
            return tokens
        states = self.token_projection(self.token_whitening(labels.tokens))
        mask = torch.cat([labels.mask.new_ones(tokens.shape[:2]), labels.mask], dim=1)
        return Tokens(torch.cat([tokens, states.to(tokens.dtype)], dim=1), mask)

    def _check_shapes(self, x_t: torch.Tensor, noise_levels: torch.Tensor, labels: Labels) -> None:
        if x_t.ndim != 4 or x_t.shape[1] != self.latent_channels:
            raise ValueError(f"x_t must be (B, {self.latent_channels}, H, W), not {tuple(x_t.shape)}")
        self.check_sides(*x_t.shape[2:])
        if noise_levels.numel() not in (1, x_t.shape[0]):
            raise ValueError(f"{noise_levels.numel()} noise levels for {x_t.shape[0]} samples: need one, or one each")
        shape = tuple(pooled(labels).shape)
        if shape != (x_t.shape[0], self.text_dim):
            raise ValueError(f"text_embeddings must be ({x_t.shape[0]}, {self.text_dim}), one per sample, not {shape}")
        if self.token_dim is not None and not isinstance(labels, Text):
            raise ValueError(
                "this UNet reads token states: give text_embeddings as a Text of vectors, token states and a mask"
            )
        if self.token_dim is not None and labels.tokens.shape[2] != self.token_dim:
            raise ValueError(f"token states must be (B, T, {self.token_dim}), not {tuple(labels.tokens.shape)}")


def get_network(
    latent_image_size: int,
    block_depth: int,
    emb_size: int,
    latent_channels: int,
    *,
    widths: Sequence[int] = (128, 256, 512),
    text_dim: int = 512,
    token_dim: int | None = None,
    size_condition: bool = False,
) -> UNet:
    """A `UNet` for square latents of `latent_image_size`, checked to fit.

    Raises `ValueError` if the widths would halve the latent more often than its size allows.
    """
    halvings = len(widths) - 1
    if latent_image_size < 1 or latent_image_size % 2 ** max(halvings, 0):
        raise ValueError(
            f"latent_image_size {latent_image_size} cannot be halved {halvings} times, as {len(widths)} "
            f"widths ask for: it must be a multiple of {2 ** max(halvings, 0)}"
        )
    return UNet(latent_channels, widths, block_depth, emb_size, text_dim, token_dim, size_condition)
