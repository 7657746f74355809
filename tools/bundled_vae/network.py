"""A lean network to train, and the plain `AutoencoderTiny` that it becomes.

diffusers' `AutoencoderTiny` wants one width for all levels of a half, and convolves after up-sampling. Training
spends its time where that is dear: at full resolution. So the network trained here is an `AutoencoderTiny` whose
convolutions are *narrowed* level by level, and whose up-sampling convolutions work before the up-sampling (four
2x2 kernels instead of one 3x3 on four times the pixels). Both are exact: `plain_autoencoder` fills the narrowed
kernels up with zeros and gives a model that diffusers loads by itself and that computes the same function.

Latents are normalised in training by `LatentNorm`, whose scale and shift end in the encoder's last convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

# Row p: how the 3 taps of a kernel on the nearest-neighbour up-sampled row fall on the 2 source pixels under phase p.
_PHASE_TAPS = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])


@dataclass(frozen=True)
class Architecture:
    """Widths and residual blocks a level, each from the half's first level to its last.

    The encoder's levels are at 128, 64, 32, 16 pixels (for a picture of 128), the decoder's at 16, 32, 64, 128.
    """

    encoder_widths: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    latent_channels: int = 4


class UpsampledConv(nn.Module):
    """A 3x3 convolution of the twice up-sampled input, computed at the input's resolution."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, O, 2H, 2W)`, equal to `conv2d(upsample(x), weight, padding=1)`."""
        taps = _PHASE_TAPS.to(self.weight)
        kernels = torch.einsum("pak,qbl,oikl->pqoiab", taps, taps, self.weight)
        out_channels, in_channels = self.weight.shape[:2]
        phases = F.conv2d(x, kernels.reshape(4 * out_channels, in_channels, 2, 2), padding=1)
        phases = phases.permute(0, 2, 3, 1).unflatten(-1, (2, 2, out_channels))
        height, width = x.shape[-2:]
        rows = [torch.stack([phases[:, p : p + height, q : q + width, p, q] for q in (0, 1)], dim=3) for p in (0, 1)]
        return torch.stack(rows, dim=2).view(x.shape[0], 2 * height, 2 * width, out_channels).permute(0, 3, 1, 2)


class LatentNorm(nn.Module):
    """Zero mean and unit std for each latent channel, by Batch Renormalization (Ioffe 2017, arXiv:1702.03275).

    Values are normalised by running statistics, gradients as by the batch's own, so that the encoder can
    not outgrow the noise. Statistics are taken on the first half of a batch: the exact renders.
    """

    def __init__(self, channels: int, momentum: float = 0.01) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, latent: Tensor) -> Tensor:
        """Latents `(B, C, h, w)` in float32, normalised."""
        if self.training:
            half = latent[: max(1, latent.shape[0] // 2)]
            mean, std = half.mean((0, 2, 3)), half.std((0, 2, 3)) + 1e-4
            with torch.no_grad():
                self.batches += 1
                rate = max(self.momentum, 1 / float(self.batches))
                self.mean += rate * (mean - self.mean)
                self.std += rate * (std - self.std)
                scale, shift = std / self.std, (mean - self.mean) / self.std
            latent = (latent - _channels(mean)) / _channels(std)
            return latent * _channels(scale) + _channels(shift)
        return (latent - _channels(self.mean)) / _channels(self.std)


class TrainingAutoencoder(nn.Module):
    """The narrowed autoencoder: `encode` and `decode` on pixels in [0, 1]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        vae = _uniform(architecture)
        _narrow_encoder(vae.encoder.layers, architecture)
        _narrow_decoder(vae.decoder.layers, architecture)
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.norm = LatentNorm(architecture.latent_channels)
        _initialise(self)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels `(B, 3, H, W)` in [0, 1] -> normalised latents `(B, 4, H/8, W/8)` in float32."""
        latent = self.encoder.layers(images)
        with torch.autocast(latent.device.type, enabled=False):
            return self.norm(latent.float())

    def decode(self, latent: Tensor) -> Tensor:
        """Latents `(B, 4, h, w)` -> pixels `(B, 3, 8h, 8w)`, in [0, 1] but for over- and undershoot."""
        return self.decoder.layers(torch.tanh(latent / 3) * 3).float()


def plain_autoencoder(network: TrainingAutoencoder) -> AutoencoderTiny:
    """The same function as diffusers' own `AutoencoderTiny`, the latent normalisation folded into its encoder."""
    vae = _uniform(network.architecture)
    narrow, full = network.state_dict(), vae.state_dict()
    for name, tensor in full.items():
        source = narrow[name]
        tensor.zero_()
        tensor[tuple(slice(size) for size in source.shape)] = source
    vae.load_state_dict(full)
    standardise(vae, network.norm.mean, network.norm.std)
    return vae.eval()


@torch.no_grad()
def standardise(vae: AutoencoderTiny, mean: Tensor, std: Tensor) -> None:
    """Let the encoder's last convolution give `(latent - mean) / std` for each channel, in place; both `(C,)`."""
    last = vae.encoder.layers[-1]
    last.weight /= std.view(-1, 1, 1, 1)
    last.bias.copy_((last.bias - mean) / std)


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _uniform(architecture: Architecture) -> AutoencoderTiny:
    levels = len(architecture.encoder_widths)
    return AutoencoderTiny(
        encoder_block_out_channels=(max(architecture.encoder_widths),) * levels,
        decoder_block_out_channels=(max(architecture.decoder_widths),) * levels,
        num_encoder_blocks=tuple(architecture.encoder_blocks),
        num_decoder_blocks=tuple(architecture.decoder_blocks),
        latent_channels=architecture.latent_channels,
    )


def _narrow(conv: nn.Conv2d, out_channels: int, in_channels: int) -> None:
    conv.weight = nn.Parameter(conv.weight.detach()[:out_channels, :in_channels].clone())
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[:out_channels].clone())


def _narrow_block(block: AutoencoderTinyBlock, width: int) -> None:
    for layer in block.conv:
        if isinstance(layer, nn.Conv2d):
            _narrow(layer, width, width)


def _narrow_encoder(layers: nn.Sequential, architecture: Architecture) -> None:
    widths = [3, *architecture.encoder_widths]
    level = 0
    for layer in layers[:-1]:
        if isinstance(layer, nn.Conv2d):
            level += 1
            _narrow(layer, widths[level], widths[level - 1])
        else:
            _narrow_block(layer, widths[level])
    _narrow(layers[-1], architecture.latent_channels, widths[-1])


def _narrow_decoder(layers: nn.Sequential, architecture: Architecture) -> None:
    widths: Sequence[int] = architecture.decoder_widths
    _narrow(layers[0], widths[0], architecture.latent_channels)
    level = 0
    for index, layer in enumerate(layers[1:-1], start=1):
        if isinstance(layer, AutoencoderTinyBlock):
            _narrow_block(layer, widths[level])
        elif isinstance(layer, nn.Upsample):
            layers[index] = nn.Identity()
        elif isinstance(layer, nn.Conv2d):
            level += 1
            layers[index] = UpsampledConv(layer.weight.detach()[: widths[level], : widths[level - 1]].clone())
    _narrow(layers[-1], 3, widths[-1])


@torch.no_grad()
def _initialise(network: TrainingAutoencoder) -> None:
    """He initialisation for ReLU; each residual branch starts at a tenth, the output at mid grey."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter.zero_()
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            if name.endswith("conv.4.weight"):
                parameter *= 0.1
    network.encoder.layers[-1].weight *= 0.5
    network.decoder.layers[-1].weight *= 0.1
    network.decoder.layers[-1].bias.fill_(0.9)
