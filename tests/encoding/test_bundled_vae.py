"""The VAE that the package carries keeps the promises of its model card, on emoji that it never saw."""

from pathlib import Path

import pytest
import torch
from bundled_vae import training
from bundled_vae.data import evaluation_stems, rendered
from bundled_vae.training import encode_all, psnr

import latentloom.encoding

FOLDER = Path(latentloom.encoding.__file__).parent / "bundled_vae"


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(FOLDER, torch_dtype=torch.float32).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def held_out():
    return rendered(evaluation_stems(), 128)


def test_the_figures_are_taken_on_at_least_128_held_out_emoji(held_out):
    assert len(held_out) >= 128


@pytest.fixture(scope="module")
def latents(vae, held_out):
    return encode_all(vae, held_out)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "promised_db"), [(0.0, 26.9), (0.2, 25.6), (0.3, 24.2)])
def test_held_out_emoji_are_reconstructed_as_promised_also_from_noisy_latents(
    vae, held_out, latents, monkeypatch, noise, promised_db
):
    monkeypatch.setattr(training, "encode_all", lambda *arguments: latents)  # which is the same for every noise
    assert psnr(training.reconstruct(vae, held_out, noise), held_out).mean().item() >= promised_db


def test_latents_are_4x16x16_of_about_zero_mean_and_unit_std_in_each_channel(held_out, latents):
    assert latents.shape == (len(held_out), 4, 16, 16)
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_the_weights_take_at_most_6_mb():
    assert (FOLDER / "diffusion_pytorch_model.safetensors").stat().st_size <= 6_000_000
