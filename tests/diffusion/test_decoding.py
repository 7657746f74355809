"""Decoding latents to pixels."""

import numpy as np
import pytest
import torch

from latentloom.diffusion import decode_latents


class Enlarging:
    """A decoder simple enough to know the answer: the first three channels, each position made 2x2 pixels."""

    def __init__(self):
        self.batches = []

    def decode(self, z):
        self.batches.append(len(z))
        return z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_latents_are_destandardised_per_channel_before_decoding():
    latents = np.random.default_rng(0).normal(size=(3, 2, 2, 4)) * 0.3
    std, mean = np.array([0.5, 1.0, 2.0, 4.0]), np.array([0.1, 0.0, -0.1, 9.0])
    pixels = ((latents * std + mean)[..., :3].repeat(2, 1).repeat(2, 2) + 1) * 127.5
    images = decode_latents(latents, std, mean_latent=mean, vae=Enlarging())
    assert images.shape == (3, 4, 4, 3) and images.dtype == np.uint8
    assert np.abs(images - pixels.clip(0, 255)).max() <= 0.5 + 1e-3
    channels_first = torch.from_numpy(latents).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(
        decode_latents(channels_first, torch.from_numpy(std), mean_latent=mean, vae=Enlarging()), images
    )


def test_values_beyond_the_range_saturate_and_large_batches_are_split():
    vae = Enlarging()
    latents = np.concatenate([np.full((3, 2, 2, 4), 9.0), np.full((2, 2, 2, 4), -9.0)])
    images = decode_latents(latents, 1.0, vae=vae, batch_size=2)
    assert images[:3].min() == 255 and images[3:].max() == 0
    assert vae.batches == [2, 2, 1]


def test_a_vae_of_diffusers_decodes():
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    latents = torch.randn(2, 4, 8, 8)
    images = decode_latents(latents, 2.0, vae=vae)
    with torch.no_grad():
        expected = ((vae.decode(latents * 2.0).sample + 1) * 127.5).round().clamp(0, 255).byte()
    np.testing.assert_array_equal(images, expected.permute(0, 2, 3, 1).numpy())


def test_broken_latents_are_rejected():
    with pytest.raises(ValueError, match="not finite"):
        decode_latents(np.full((1, 2, 2, 4), np.nan), 1.0, vae=Enlarging())
