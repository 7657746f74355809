"""The Diffuser: against diffusers' DDIM, guidance by its formula, and a small network that obeys text."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentloom.diffusion import (
    Diffuser,
    SamplingSettings,
    UNet,
    add_noise,
    dynamic_thresholding,
    get_schedule,
    noise_levels_from_uniform,
)

GAMMA = {"vp": lambda a: np.sqrt(1 - a**2), "linear": lambda a: 1 - a}


UNTHRESHOLDED = SamplingSettings(threshold_percentile=None)


def wavy(x_t, noise_levels, text):
    """A deterministic denoiser that depends, not linearly, on all it is given."""
    level, wish = noise_levels[:, None, None, None], text.mean(1)[:, None, None, None]
    return torch.tanh(x_t + wish) * (1 - 0.5 * level) + 0.2 * torch.sin(3 * x_t.roll(1, 3)) + 0.1 * wish


def seeds_and_labels(batch=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, 8, 8, 4)).astype(dtype), rng.normal(size=(batch, 6)).astype(dtype)


@pytest.mark.parametrize("steps", [2, 7, 70])
def test_the_vp_trajectory_is_that_of_diffusers_ddim(steps):
    from diffusers import DDIMScheduler

    seeds, labels = seeds_and_labels()
    diffuser = Diffuser(wavy, 1.0, steps, settings=UNTHRESHOLDED)
    levels = diffuser.noise_levels

    scheduler = DDIMScheduler(
        num_train_timesteps=steps, prediction_type="sample", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.alphas_cumprod = torch.from_numpy(GAMMA["vp"](levels[:-1][::-1].copy()) ** 2)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(range(steps))[::-1]
    x, text = torch.from_numpy(seeds).permute(0, 3, 1, 2), torch.from_numpy(labels)
    for timestep, level in zip(scheduler.timesteps, levels[:-1], strict=True):
        x = scheduler.step(wavy(x, torch.full((3,), level, dtype=x.dtype), text), timestep, x, eta=0.0).prev_sample
    np.testing.assert_allclose(diffuser.reverse_diffusion(seeds, labels), x.permute(0, 2, 3, 1).numpy(), atol=1e-9)


@pytest.mark.parametrize("schedule", GAMMA)
def test_the_trajectory_follows_the_schedules_own_process(schedule):
    """In float64 NumPy, by way of the noise estimate rather than the coefficients."""
    seeds, labels = seeds_and_labels()
    diffuser = Diffuser(wavy, 3.0, 9, schedule=schedule, bound=0.7)
    x, gamma, levels = seeds.transpose(0, 3, 1, 2), GAMMA[schedule], diffuser.noise_levels
    for level, next_level in pairwise(levels):
        with_text, without = (
            wavy(torch.from_numpy(x), torch.full((3,), level, dtype=torch.float64), torch.from_numpy(text)).numpy()
            for text in (labels, np.zeros_like(labels))
        )
        x0_hat = dynamic_thresholding(3 * with_text - 2 * without, bound=0.7)
        eps_hat = (x - gamma(level) * x0_hat) / level
        x = gamma(next_level) * x0_hat + next_level * eps_hat
    np.testing.assert_allclose(diffuser.reverse_diffusion(seeds, labels), x.transpose(0, 2, 3, 1), atol=1e-9)


@pytest.mark.parametrize("schedule", GAMMA)
def test_errors_that_shrink_with_the_noise_level_leave_no_trace_in_x0(schedule):
    truth = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def nearly_perfect(x_t, noise_levels, text):
        return truth + 1e-3 * noise_levels[:, None, None, None] * x_t

    seeds = torch.randn(5, 8, 8, 4, generator=torch.Generator().manual_seed(1))
    diffuser = Diffuser(nearly_perfect, 1.0, 70, settings=UNTHRESHOLDED, schedule=schedule)
    latents = diffuser.reverse_diffusion(seeds, torch.zeros(5, 6))
    assert (latents - truth.permute(0, 2, 3, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("schedule", GAMMA)
def test_with_a_perfect_denoiser_the_trajectory_goes_back_along_the_forward_process(schedule):
    """Before its end, the trajectory is at the forward process of the same noise; at its end, at x0."""
    truth, noise = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    forward, visited = get_schedule(schedule), []

    def perfect(x_t, noise_levels, text):
        visited.append((x_t - forward.add_noise(truth, noise, noise_levels)).abs().max().item())
        return truth

    diffuser = Diffuser(perfect, 1.0, 70, settings=UNTHRESHOLDED, schedule=schedule)
    latents = diffuser.reverse_diffusion(noise, torch.zeros(5, 6))
    assert len(visited) == 70 and max(visited) < 1e-4
    assert (latents - truth).abs().max() < 1e-4


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guidance_mixes_the_predictions_with_and_without_text(w):
    seeds, labels = seeds_and_labels()
    x, text = torch.from_numpy(seeds).permute(0, 3, 1, 2), torch.from_numpy(labels)
    level = torch.full((3,), 0.6, dtype=torch.float64)
    expected = w * wavy(x, level, text) + (1 - w) * wavy(x, level, torch.zeros_like(text))
    predicted = Diffuser(wavy, w, 5).predict_x_zero(x, text, 0.6)
    torch.testing.assert_close(predicted, expected)
    as_array = Diffuser(wavy, w, 5).predict_x_zero(seeds, labels, 0.6)
    np.testing.assert_allclose(as_array, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(("w", "samples"), [(0.0, 3), (1.0, 3), (4.0, 6)])
def test_each_step_is_one_call_and_plain_guidance_costs_no_second_half(w, samples):
    calls = []

    def counting(x_t, noise_levels, text):
        calls.append((len(x_t), len(noise_levels), len(text)))
        return wavy(x_t, noise_levels, text)

    Diffuser(counting, w, 5).reverse_diffusion(*seeds_and_labels())
    assert calls == [(samples,) * 3] * 5


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_outside_its_interval_guidance_is_off_and_costs_nothing(sampler):
    levels, texts = [], []

    def recording(x_t, noise_levels, text):
        levels.append(noise_levels[0].item())
        texts.append(text)
        return wavy(x_t, noise_levels, text)

    seeds, labels = seeds_and_labels()
    settings = SamplingSettings(sampler=sampler, guidance_interval=(0.2, 0.8))
    Diffuser(recording, 4.0, 20, settings=settings).reverse_diffusion(seeds, labels)
    inside = [0.2 <= level <= 0.8 for level in levels]
    assert 5 < sum(inside) < 15 and not inside[0] and not inside[-1]
    for guided, text in zip(inside, texts, strict=True):
        assert len(text) == (6 if guided else 3)
        np.testing.assert_array_equal(text[:3], labels)


@pytest.mark.parametrize("level", [0.1, 0.2, 0.6, 0.61])
def test_both_ends_of_the_interval_belong_to_it(level):
    seeds, labels = seeds_and_labels()
    settings = SamplingSettings(guidance_interval=(0.2, 0.6))
    predicted = Diffuser(wavy, 4.0, 5, settings=settings).predict_x_zero(seeds, labels, level)
    w = 4.0 if level in (0.2, 0.6) else 1.0
    np.testing.assert_array_equal(predicted, Diffuser(wavy, w, 5).predict_x_zero(seeds, labels, level))


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_guidance_rescale_goes_back_towards_the_contrast_of_the_conditional_prediction(phi):
    """Lin et al. 2024, eq. 15 and 16, in NumPy; each sample by itself."""
    seeds, labels = seeds_and_labels()
    predicted, plain, guided = (
        Diffuser(wavy, w, 5, settings=SamplingSettings(guidance_rescale=rescale)).predict_x_zero(seeds, labels, 0.6)
        for w, rescale in ((5.0, phi), (1.0, 0.0), (5.0, 0.0))
    )
    for ours, x_pos, x_cfg in zip(predicted, plain, guided, strict=True):
        rescaled = x_cfg * (x_pos.std() / x_cfg.std())
        np.testing.assert_allclose(ours, phi * rescaled + (1 - phi) * x_cfg)
        assert ours.std() != pytest.approx(x_cfg.std(), rel=1e-3)


def test_guidance_rescale_leaves_a_prediction_without_contrast_alone():
    def flat(x_t, noise_levels, text):
        return text.sum(1).view(-1, 1, 1, 1).expand_as(x_t)

    seeds, labels = seeds_and_labels()
    expected = np.broadcast_to(3 * labels.sum(1)[:, None, None, None], seeds.shape)
    np.testing.assert_allclose(
        Diffuser(flat, 3.0, 5, settings=SamplingSettings(guidance_rescale=0.7)).predict_x_zero(seeds, labels, 0.5),
        expected,
    )


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_defaults_are_bit_for_bit_the_plain_trajectory(w):
    seeds, labels = (torch.from_numpy(array) for array in seeds_and_labels(dtype=np.float32))
    x, schedule = seeds.permute(0, 3, 1, 2), get_schedule("vp")
    diffuser = Diffuser(wavy, w, 9, bound=0.7)
    for level, next_level in pairwise(diffuser.noise_levels.tolist()):
        levels = torch.full((3,), level)
        predictions = [(factor, wavy(x, levels, text)) for factor, text in ((w, labels), (1 - w, 0 * labels)) if factor]
        x0_hat = sum(x0 if factor == 1 else factor * x0 for factor, x0 in predictions)
        x0_hat = dynamic_thresholding(x0_hat, bound=0.7)
        x = schedule.step(x, x0_hat, level, next_level) if next_level else x0_hat
    assert torch.equal(diffuser.reverse_diffusion(seeds, labels), x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_no_step_waits_for_the_device_or_moves_anything_to_or_from_it(sampler, monkeypatch):
    """On the meta device, whose tensors have no values: whoever asks for one fails, or leaves the device."""

    class StaysOnDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            assert all(tensor.is_meta for tensor in tensors), func
            return result

    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # does not know this device
    network = UNet(4, (16, 32), 1, 16, 24).to("meta")
    seeds, labels = torch.empty(3, 4, 8, 8, device="meta"), torch.empty(3, 24, device="meta")
    settings = SamplingSettings(sampler=sampler, guidance_interval=(0.2, 0.8), guidance_rescale=0.5)
    diffuser = Diffuser(network, 3.0, 4, settings=settings)
    with StaysOnDevice():
        assert diffuser.reverse_diffusion(seeds, labels, layout="nchw").shape == seeds.shape


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_latents_come_back_in_the_layout_and_kind_of_the_seeds(layout, kind):
    seeds, labels = seeds_and_labels(dtype=np.float32)
    diffuser = Diffuser(wavy, 2.0, 4)
    expected = diffuser.reverse_diffusion(seeds, labels)
    given = seeds if layout == "nhwc" else seeds.transpose(0, 3, 1, 2)
    result = diffuser.reverse_diffusion(given if kind == "numpy" else torch.from_numpy(given), labels)
    assert type(result) is (np.ndarray if kind == "numpy" else torch.Tensor)
    result = np.asarray(result) if layout == "nhwc" else np.asarray(result).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(result, expected)


def test_latents_of_four_by_four_are_channels_last_by_default():
    seeds, labels = np.random.default_rng(0).normal(size=(2, 4, 4, 4)), np.ones((2, 6))
    diffuser = Diffuser(wavy, 1.0, 4)
    last = diffuser.reverse_diffusion(seeds, labels)
    first = diffuser.reverse_diffusion(seeds.transpose(0, 3, 1, 2), labels, layout="nchw")
    np.testing.assert_allclose(first.transpose(0, 2, 3, 1), last)
    assert not np.allclose(diffuser.reverse_diffusion(seeds, labels, layout="nchw"), last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"diffusion_steps": 0}, "diffusion_steps = 0: must be a whole number from 2"),
        ({"class_guidance": float("nan")}, "class_guidance = nan: must be a number"),
    ],
)
def test_impossible_arguments_are_rejected_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Diffuser(**{"denoiser": wavy, "class_guidance": 1.0, "diffusion_steps": 4} | options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"threshold_percentile": 120}, "from 50 to 100"),
        ({"sampler": "euler"}, "sampler = 'euler': must be one of ddim, dpmpp_2m"),
        ({"guidance_interval": (0.6, 0.3)}, r"guidance_interval = \(0.6, 0.3\): .*lowest < highest"),
        ({"guidance_rescale": 1.5}, "guidance_rescale = 1.5: must be a number, from 0 to 1"),
        ({"precision": "fp8"}, "precision = 'fp8': must be one of auto, fp32, bf16"),
    ],
)
def test_impossible_settings_are_rejected_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**setting)
    with pytest.raises(ValueError, match=message):
        SamplingSettings().changed(**setting)


def test_seeds_and_labels_that_do_not_match_are_named():
    seeds, labels = seeds_and_labels()
    with pytest.raises(ValueError, match=r"\(3, text_dim\).*\(2, 6\)"):
        Diffuser(wavy, 1.0, 4).reverse_diffusion(seeds, labels[:2])
    with pytest.raises(ValueError, match=r"\(3, 8, 8, 5\)"):
        Diffuser(wavy, 1.0, 4).reverse_diffusion(np.zeros((3, 8, 8, 5)), labels)


@pytest.fixture(scope="module")
def two_words():
    """A tiny network taught that one word means a bright left half, the other a bright right half."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    words = torch.eye(2, 8)
    meanings = torch.full((2, 4, 8, 8), -1.0)
    meanings[0, :, :, :4] = meanings[1, :, :, 4:] = 1.0
    network = UNet(4, (16, 32), 1, 16, 8)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(150):
        word = torch.randint(2, (32,), generator=generator)
        x0 = meanings[word]
        u = torch.rand(32, generator=generator)
        noised = add_noise(x0, noise_levels=noise_levels_from_uniform(u), generator=generator)
        text = words[word] * (torch.rand(32, 1, generator=generator) > 0.15)
        loss = (network(noised.x_t, noised.noise_levels, text) - x0).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, words, meanings


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_a_trained_network_generates_what_the_text_says(two_words, w, sampler):
    network, words, meanings = two_words
    seeds = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    word = torch.tensor([0, 1] * 4)
    diffuser = Diffuser(network, w, 12, settings=SamplingSettings(sampler=sampler))
    latents = diffuser.reverse_diffusion(seeds, words[word])
    right = (latents - meanings[word]).abs().mean((1, 2, 3))
    wrong = (latents - meanings[1 - word]).abs().mean((1, 2, 3))
    assert (right < 0.3).all() and (wrong > 1.5).all()
    swapped = diffuser.reverse_diffusion(seeds, words[1 - word])
    assert ((swapped - latents).abs().mean((1, 2, 3)) > 1).all()


@pytest.fixture(scope="module")
def network():
    """One of random weights; the last layer starts at zero, and would predict the same whatever it is given."""
    torch.manual_seed(0)
    network = UNet(4, (16, 32), 1, 16, 8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


WORDS = torch.eye(2, 8)


def test_the_order_and_the_company_of_a_batch_do_not_matter(network):
    seeds = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    text, order = WORDS[[0, 1, 1, 0]], torch.tensor([2, 0, 3, 1])
    diffuser = Diffuser(network, 2.0, 10)
    together = diffuser.reverse_diffusion(seeds, text)
    torch.testing.assert_close(
        diffuser.reverse_diffusion(seeds[order], text[order]), together[order], rtol=0, atol=1e-3
    )
    alone = torch.cat([diffuser.reverse_diffusion(seeds[i : i + 1], text[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)


def test_sampling_repeats_itself_leaves_no_gradients_and_keeps_precision_under_autocast(network):
    seeds = np.random.default_rng(0).normal(size=(2, 8, 8, 4))
    labels = WORDS.numpy().astype(np.float64)
    diffuser = Diffuser(network, 2.0, 10)
    latents = diffuser.reverse_diffusion(seeds, labels)
    np.testing.assert_array_equal(latents, diffuser.reverse_diffusion(seeds, labels))
    assert not diffuser.reverse_diffusion(torch.from_numpy(seeds), labels).requires_grad
    with torch.inference_mode():
        np.testing.assert_array_equal(latents, diffuser.reverse_diffusion(seeds, labels))
    half = Diffuser(network, 2.0, 10, autocast_dtype=torch.bfloat16).reverse_diffusion(seeds, labels)
    assert half.dtype == latents.dtype and 0 < np.abs(half - latents).mean() < 0.05


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", GAMMA)
def test_a_start_is_noised_to_the_level_of_its_strength_and_goes_the_rest_of_the_way(schedule, sampler):
    """0: the start itself; 1: as without one, bit for bit; between: the trajectory from there on, in float64 NumPy."""
    seeds, labels = seeds_and_labels()
    start = np.random.default_rng(9).normal(size=seeds.shape)
    settings = SamplingSettings(10, 2.0, sampler, threshold_percentile=None)
    diffuser = Diffuser(wavy, settings=settings, schedule=schedule)

    def from_start(strength):
        return diffuser.reverse_diffusion(seeds, labels, start=start, strength=strength)

    np.testing.assert_array_equal(from_start(0.0), start)
    np.testing.assert_array_equal(from_start(1.0), diffuser.reverse_diffusion(seeds, labels))
    levels, gamma = diffuser.noise_levels, GAMMA[schedule]
    level, text = levels[9], torch.from_numpy(labels)  # one step is left of ten: its prediction is the result
    x = torch.from_numpy(gamma(level) * start + level * seeds).permute(0, 3, 1, 2)
    alpha = torch.full((3,), level, dtype=torch.float64)
    expected = 2 * wavy(x, alpha, text) - wavy(x, alpha, torch.zeros_like(text))
    for strength in (0.1, 1e-9):
        np.testing.assert_allclose(from_start(strength), expected.permute(0, 2, 3, 1).numpy(), atol=1e-12)
    with pytest.raises(ValueError, match=r"strength = 1\.5: must be a number, from 0 to 1"):
        from_start(1.5)
    with pytest.raises(ValueError, match="below 1 it needs start"):
        diffuser.reverse_diffusion(seeds, labels, strength=0.5)


def test_a_negative_label_takes_the_place_of_no_text_where_guidance_acts():
    seeds, labels = seeds_and_labels()
    away = np.random.default_rng(8).normal(size=labels.shape)
    x, text, other = torch.from_numpy(seeds).permute(0, 3, 1, 2), torch.from_numpy(labels), torch.from_numpy(away)
    level = torch.full((3,), 0.6, dtype=torch.float64)
    expected = {0.0: wavy(x, level, other), 1.0: wavy(x, level, text)}
    expected[3.0] = 3 * expected[1.0] - 2 * expected[0.0]
    for w, prediction in expected.items():
        torch.testing.assert_close(Diffuser(wavy, w, 5).predict_x_zero(x, text, 0.6, negative=other), prediction)
    outside = Diffuser(wavy, 3.0, 5, settings=SamplingSettings(guidance_interval=(0.7, 1.0)))
    torch.testing.assert_close(outside.predict_x_zero(x, text, 0.6, negative=other), expected[1.0])
    diffuser = Diffuser(wavy, 3.0, 5)
    guided = diffuser.reverse_diffusion(seeds, labels, negative=away)
    nothing = diffuser.reverse_diffusion(seeds, labels, negative=np.zeros_like(labels))
    np.testing.assert_array_equal(nothing, diffuser.reverse_diffusion(seeds, labels))
    assert np.abs(guided - nothing).mean() > 0.01


def test_each_step_tells_its_prediction_and_the_last_one_is_the_result():
    told = []
    seeds, labels = seeds_and_labels()
    latents = Diffuser(wavy, 2.0, 5).reverse_diffusion(seeds, labels, on_prediction=lambda *step: told.append(step))
    assert [step for step, _ in told] == [0, 1, 2, 3, 4]
    assert all(prediction.shape == seeds.shape for _, prediction in told)
    np.testing.assert_array_equal(told[-1][1], latents)
