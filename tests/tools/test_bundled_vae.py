"""The training of the bundled VAE: an honest split, exact shortcuts, a falling loss, resuming."""

import pytest
import torch
import torch.nn.functional as F
from bundled_vae.checkpoint import resume, save_checkpoint
from bundled_vae.data import (
    Pictures,
    draw_batch,
    evaluation_stems,
    family_key,
    is_held_out,
    openmoji_stems,
    rendered,
    untoned,
)
from bundled_vae.network import Architecture, LatentNorm, UpsampledConv, plain_autoencoder
from bundled_vae.training import Recipe, begin, encode_all, finished_vae, train

TINY = Architecture((8, 16, 16, 16), (0, 1, 1, 1), (16, 16, 16, 8), (1, 1, 1, 0))


@pytest.fixture(scope="module")
def pictures():
    stems = [stem for stem in openmoji_stems() if not is_held_out(stem)][:400:50]
    return Pictures(rendered(stems, 32), rendered(stems, 48), torch.ones(len(stems)))


def recipe(steps: int) -> Recipe:
    return Recipe(
        TINY, steps=steps, batch_size=4, warmup_steps=5, decay_start=steps // 2, muon_rate=5e-3, ema_decay=0.9
    )


@pytest.mark.parametrize(
    ("variants", "family"),
    [
        (("1F44B", "1F44B-1F3FD"), "1F44B"),
        (("1F468-1F3FC-200D-1F680", "1F469-200D-1F680", "1F9D1-200D-1F680"), "person-1F680"),
        (("1F3C3-200D-2640-FE0F", "1F3C3-1F3FB-200D-2642-FE0F-200D-27A1-FE0F"), "1F3C3"),
        (("1F46B", "1F9D1-200D-1F91D-200D-1F9D1"), "person-1F91D-person"),
    ],
)
def test_variants_of_one_drawing_are_one_family(variants, family):
    assert {family_key(variant) for variant in variants} == {family}


def test_no_held_out_family_is_trained_on():
    stems = openmoji_stems()
    trained = {family_key(stem) for stem in stems if not is_held_out(stem)}
    assert not trained & {family_key(stem) for stem in stems if is_held_out(stem)}
    assert all(is_held_out(stem) and stem in stems and untoned(stem) for stem in evaluation_stems())


def test_a_batch_is_a_function_of_seed_and_step(pictures):
    batch = draw_batch(pictures, 4, seed=1, step=7)
    assert batch.shape == (4, 3, 32, 32)
    assert 0 <= batch.min() <= batch.max() <= 1
    torch.testing.assert_close(batch, draw_batch(pictures, 4, seed=1, step=7), atol=0, rtol=0)
    assert not torch.equal(batch, draw_batch(pictures, 4, seed=1, step=8))


def test_the_convolution_before_upsampling_equals_the_one_after():
    torch.manual_seed(0)
    weight, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    after = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    torch.testing.assert_close(UpsampledConv(weight)(x), after)


def test_the_plain_autoencoder_computes_what_the_trained_network_does(pictures):
    state = begin(recipe(3))
    for _ in train(state, pictures, recipe(3), bf16=False):
        pass
    images = draw_batch(pictures, 4, seed=0, step=0)
    network, vae = state.network.eval(), plain_autoencoder(state.network)
    with torch.no_grad():
        latents = network.encode(images)
        torch.testing.assert_close(vae.encode(images * 2 - 1).latents, latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latents).sample, network.decode(latents) * 2 - 1, atol=1e-4, rtol=1e-4)


def test_latent_norm_gives_zero_mean_and_unit_std_and_no_gradient_to_the_scale():
    torch.manual_seed(0)
    norm, scale = LatentNorm(4), torch.ones((), requires_grad=True)
    latent = torch.randn(8, 4, 6, 6) * 5 + 2
    normalised = norm(torch.cat([latent[:4]] * 2) * scale)
    assert normalised.mean((0, 2, 3)).abs().max() < 1e-3
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-2
    (normalised**3).mean().backward()
    assert scale.grad.abs() < 1e-3


@pytest.mark.slow
def test_training_on_a_handful_of_pictures_lowers_the_loss(pictures):
    state = begin(recipe(100))
    losses = [after.losses["loss"] for after in train(state, pictures, recipe(100))]
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


def test_a_finished_vae_standardises_the_latents_of_the_pictures_it_is_given(pictures):
    latents = encode_all(finished_vae(begin(recipe(1)), pictures.exact), pictures.exact)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_a_resumed_training_ends_as_if_it_had_never_stopped(pictures, tmp_path):
    whole, first, second = begin(recipe(6)), begin(recipe(6)), begin(recipe(6))
    for _ in train(whole, pictures, recipe(6)):
        pass
    for _ in train(first, pictures, recipe(6)):
        if first.step == 3:
            break
    save_checkpoint(first, tmp_path / "checkpoint.safetensors")
    assert resume(second, tmp_path / "checkpoint.safetensors")
    for _ in train(second, pictures, recipe(6)):
        pass
    for name, tensor in whole.average.state_dict().items():
        torch.testing.assert_close(second.average.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
