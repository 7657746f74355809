"""Decoding latents to pixels, and drawing them."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from latentloom.diffusion import decode_latents, imshow, plot_images

mpl.use("Agg")
import matplotlib.pyplot as plt


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
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    latents = torch.randn(2, 4, 8, 8)
    images = decode_latents(latents, 2.0, vae=vae)
    with torch.no_grad():
        expected = ((vae.decode(latents * 2.0).sample + 1) * 127.5).round().clamp(0, 255).byte()
    np.testing.assert_array_equal(images, expected.permute(0, 2, 3, 1).numpy())


def test_statistics_of_another_channel_count_and_broken_latents_are_refused():
    latents = np.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match="std_latent must be a number, or one for each of the 4 channels; 3"):
        decode_latents(latents, np.ones(3), vae=Enlarging())
    with pytest.raises(ValueError, match="not finite"):
        decode_latents(latents * np.nan, 1.0, vae=Enlarging())


@pytest.mark.parametrize("kind", ["uint8", "float", "torch", "list"])
def test_images_are_laid_out_in_a_grid_with_their_labels(kind):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    given = {
        "uint8": images,
        "float": images / 255,
        "torch": torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        "list": list(images),
    }[kind]
    figure = plot_images(given, list("abcde"), columns=3, title="five")
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(figure.axes) == 6 and [ax.get_title() for ax in drawn] == list("abcde")
    shown = np.asarray(drawn[4].images[0].get_array(), dtype=float)
    np.testing.assert_allclose(shown if kind in ("uint8", "list") else shown * 255, images[4], atol=1e-3)
    plt.close(figure)


def test_one_image_is_shown_on_axes_of_its_own_or_given_ones():
    figure, ax = plt.subplots()
    assert imshow(np.zeros((4, 4)), "grey", ax=ax) is ax
    assert imshow(np.zeros((4, 4, 3), np.uint8)).figure is not figure
    plt.close("all")


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"\(7, 5, 9\)"):
        imshow(np.zeros((7, 5, 9)))
    with pytest.raises(ValueError, match="no images"):
        plot_images([])
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        plot_images(np.zeros((2, 4, 4, 3)), ["a"])
    plt.close("all")
