"""Between pixels, raw latents and standardised latents."""

import numpy as np
import pytest
import torch

from latentloom.encoding.codec import LatentCodec

MEAN, STD = [1.0, -2.0, 0.5, 0.0], [2.0, 0.5, 1.0, 4.0]


class Doubling:
    """A VAE of one pixel per latent; its latents are twice the pixels' first channel, in four channels."""

    def encode(self, pixels):
        return {"mean": torch.from_numpy(pixels[..., :1]).permute(0, 3, 1, 2).float().repeat(1, 4, 1, 1) * 2}

    def decode(self, raw, *, batch_size=32):
        return (raw[:, :1] / 2).round().to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()


def test_standardised_latents_have_zero_mean_and_unit_std_per_channel():
    center, scale = torch.tensor(MEAN).view(4, 1, 1), torch.tensor(STD).view(4, 1, 1)
    raw = torch.randn(500, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scale + center
    standardised = LatentCodec(MEAN, STD).standardise(raw)
    np.testing.assert_allclose(standardised.mean((0, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(standardised.std((0, 2, 3)), 1, atol=0.05)


def test_samples_of_a_standardised_distribution_are_standardised_samples():
    generator = torch.Generator().manual_seed(0)
    mean, std, noise = (torch.rand(3, 4, 2, 2, generator=generator) for _ in range(3))
    codec = LatentCodec(MEAN, STD)
    expected = codec.standardise(mean + std * noise)
    torch.testing.assert_close(codec.standardise(mean) + codec.standardise_std(std) * noise, expected)


def test_latents_come_back_as_they_were_and_pixels_too():
    codec = LatentCodec(MEAN, STD, load_vae=Doubling)
    raw = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(codec.destandardise(codec.standardise(raw)), raw)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), dtype=np.uint8).repeat(3, axis=-1)
    assert np.array_equal(codec.decode(codec.encode(pixels)), pixels)


def test_latents_of_several_shapes_are_decoded_together_by_shape_and_come_back_in_order():
    batches = []

    class Counting(Doubling):
        def decode(self, raw, *, batch_size=32):
            batches.append(len(raw))
            return super().decode(raw)

    codec, random = LatentCodec(MEAN, STD, load_vae=Counting), np.random.default_rng(0)
    shapes = [(4, 6), (2, 3), (4, 6), (6, 4), (4, 6)]
    pixels = [random.integers(0, 256, (*shape, 1), dtype=np.uint8).repeat(3, axis=-1) for shape in shapes]
    images = codec.decode_each([codec.encode(own[None])[0] for own in pixels], batch_size=2)
    assert all(np.array_equal(image, own) for image, own in zip(images, pixels, strict=True))
    assert batches == [2, 1, 1, 1]


def test_stored_half_precision_is_standardised_in_fp32():
    raw = torch.randn(3, 4, 2, 2).half()
    codec = LatentCodec(MEAN, STD)
    assert codec.standardise(raw).dtype == codec.standardise_std(raw).dtype == torch.float32
    assert torch.equal(codec.standardise(raw), codec.standardise(raw.float()))


def test_the_vae_is_loaded_once_and_only_for_pixels():
    loaded = []
    codec = LatentCodec(MEAN, STD, load_vae=lambda: loaded.append(Doubling()) or loaded[0])
    codec.standardise(torch.zeros(1, 4, 2, 2))
    assert not loaded
    for _ in range(2):
        codec.encode(np.zeros((1, 4, 4, 3), np.uint8))
    assert len(loaded) == 1
    with pytest.raises(ValueError, match="without a VAE"):
        LatentCodec(MEAN, STD).encode(np.zeros((1, 4, 4, 3), np.uint8))
