"""Noise: both schedules, the noise-level distributions, the levels of sampling, thresholding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from latentloom.diffusion import (
    NOISE_LEVELS,
    SCHEDULES,
    add_noise,
    dynamic_thresholding,
    get_schedule,
    noise_levels_from_uniform,
    sampling_levels,
)
from latentloom.diffusion.noise import quantile

GAMMA = {"vp": lambda a: np.sqrt(1 - a**2), "linear": lambda a: 1 - a}


@pytest.mark.parametrize("schedule", GAMMA)
def test_forward_noising_mixes_signal_and_noise_as_the_schedule_says(schedule):
    rng = np.random.default_rng(0)
    x0, eps, alpha = rng.normal(size=(8, 4, 6, 6)), rng.normal(size=(8, 4, 6, 6)), rng.random(8)
    per_sample = alpha[:, None, None, None]
    expected = GAMMA[schedule](per_sample) * x0 + per_sample * eps
    x_t = get_schedule(schedule).add_noise(torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(alpha))
    np.testing.assert_allclose(x_t.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 1, 1)])
def test_noise_levels_of_any_per_sample_shape_mean_the_same(schedule, shape):
    x0, eps, alpha = torch.randn(5, 4, 2, 2), torch.randn(5, 4, 2, 2), torch.rand(5)
    forward = get_schedule(schedule).add_noise
    torch.testing.assert_close(forward(x0, eps, alpha.reshape(shape)), forward(x0, eps, alpha), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", GAMMA)
@given(now=st.floats(0.01, 1.0), fraction=st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_a_reverse_step_with_the_true_x0_lands_on_the_forward_process(schedule, now, fraction):
    """The property that ties a reverse step to its own forward one: x(now) -> x(next), on the same noise."""
    rng = np.random.default_rng(1)
    x0, eps = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(2, 4, 3, 3))
    then, gamma = now * fraction, GAMMA[schedule]
    stepped = get_schedule(schedule).step(
        torch.from_numpy(gamma(now) * x0 + now * eps), torch.from_numpy(x0), now, then
    )
    np.testing.assert_allclose(stepped.numpy(), gamma(then) * x0 + then * eps, atol=1e-9)


def test_a_vp_step_is_the_formula_of_the_design_and_another_schedule_steps_otherwise():
    x, x0, now, then = torch.randn(3, 4, 2, 2).double(), torch.randn(3, 4, 2, 2).double(), 0.8, 0.5
    gamma = GAMMA["vp"]
    expected = (then / now) * x + (gamma(then) - then * gamma(now) / now) * x0
    torch.testing.assert_close(get_schedule("vp").step(x, x0, now, then), expected)
    assert not torch.allclose(get_schedule("linear").step(x, x0, now, then), expected)


@pytest.mark.parametrize("schedule", GAMMA)
def test_a_step_to_zero_noise_returns_the_prediction_and_one_from_zero_is_rejected(schedule):
    x, x0 = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    torch.testing.assert_close(get_schedule(schedule).step(x, x0, 1.0, 0.0), x0)
    with pytest.raises(ValueError, match="above 0"):
        get_schedule(schedule).step(x, x0, 0.0, 0.0)


def test_unknown_names_are_rejected_and_the_known_ones_listed():
    with pytest.raises(ValueError, match=r"'cosine'.*vp, linear"):
        get_schedule("cosine")
    with pytest.raises(ValueError, match=r"'normal'.*cosine, uniform, half_normal"):
        noise_levels_from_uniform(np.zeros(3), "normal")
    with pytest.raises(ValueError, match="at least 1 step"):
        sampling_levels(0)


@pytest.mark.parametrize("distribution", NOISE_LEVELS)
def test_every_distribution_maps_uniform_numbers_in_order_into_zero_to_one(distribution):
    for dtype in (np.float32, np.float64):
        u = np.append(np.linspace(0, 1, 1000, endpoint=False), 1 - np.finfo(dtype).epsneg).astype(dtype)
        alpha = noise_levels_from_uniform(u, distribution)
        assert alpha.dtype == dtype and alpha[0] == 0 and alpha[-1] <= 1
        assert (np.diff(alpha) >= 0).all() and np.isfinite(alpha).all()


def test_half_normal_levels_are_distributed_as_truncated_normal_draws_are():
    """Kolmogorov-Smirnov distance to plain rejection sampling of |N(0, 1)| below 3."""
    rng = np.random.default_rng(0)
    normal = np.abs(rng.normal(size=200_000))
    drawn = np.sort(np.sin(np.pi / 2 * normal[normal < 3] / 3))
    ours = np.sort(noise_levels_from_uniform(rng.random(200_000), "half_normal"))
    grid = np.linspace(0, 1, 2001)
    distance = np.abs(np.searchsorted(drawn, grid) / len(drawn) - np.searchsorted(ours, grid) / len(ours)).max()
    assert distance < 1.95 * np.sqrt(2 / 199_000)  # the 0.1 % critical value


def test_cosine_and_uniform_levels_are_their_formulas():
    u = np.random.default_rng(0).random((3, 5))
    np.testing.assert_allclose(noise_levels_from_uniform(u, "cosine"), np.sin(np.pi * u / 2), rtol=1e-14)
    np.testing.assert_array_equal(noise_levels_from_uniform(u, "uniform"), u)


QUANTILES = {
    "logit_normal": lambda u: 1 / (1 + np.exp(-stats.norm.ppf(u))),
    "beta": stats.beta(1, 2.5).ppf,
}


@pytest.mark.parametrize("distribution", QUANTILES)
def test_logit_normal_and_beta_levels_are_scipys_quantiles(distribution):
    u = np.concatenate([np.geomspace(1e-9, 0.1, 50), np.linspace(0.1, 1, 101)[:-1]])
    np.testing.assert_allclose(noise_levels_from_uniform(u, distribution), QUANTILES[distribution](u), rtol=1e-6)
    u = u[u > 1e-3]
    single = noise_levels_from_uniform(u.astype(np.float32), distribution)
    np.testing.assert_allclose(single, QUANTILES[distribution](u), atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("distribution", NOISE_LEVELS)
def test_the_ends_of_the_uniform_numbers_are_the_ends_of_the_levels(distribution, dtype):
    """A stratified draw in float32 can be rounded to 1, where the tails of these distributions are infinite."""
    levels = noise_levels_from_uniform(np.array([0, 1], dtype), distribution)
    np.testing.assert_allclose(levels, [0, 1], atol=1e-6)
    assert (levels >= 0).all() and (levels <= 1).all()


@pytest.mark.parametrize("spacing", NOISE_LEVELS)
@given(steps=st.integers(1, 1000))
@settings(max_examples=20, deadline=None)
def test_sampling_levels_fall_strictly_from_one_to_exactly_zero(spacing, steps):
    levels = sampling_levels(steps, spacing)
    assert levels.shape == (steps + 1,) and levels[0] == 1 and levels[-1] == 0
    assert (np.diff(levels) < 0).all()


def test_cosine_levels_turn_by_the_same_angle_each_step():
    angles = np.arcsin(sampling_levels(70))
    np.testing.assert_allclose(np.diff(angles), -np.pi / 2 / 70, rtol=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_add_noise_returns_what_it_made_x_t_of(kind, schedule):
    x0 = np.random.default_rng(0).normal(size=(16, 5, 5, 4)).astype(np.float32)
    given_x0 = x0 if kind == "numpy" else torch.from_numpy(x0)
    noised = add_noise(given_x0, schedule=schedule, generator=torch.Generator().manual_seed(3))
    assert {type(part) for part in noised} == {type(given_x0)}
    x_t, alpha, eps = (np.asarray(part) for part in noised)
    assert alpha.shape == (16,) and x_t.shape == x0.shape
    wide = alpha.astype(np.float64)[:, None, None, None]
    np.testing.assert_allclose(x_t, GAMMA[schedule](wide) * x0 + wide * eps, atol=1e-6)
    again = add_noise(given_x0, schedule=schedule, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(x_t, np.asarray(again.x_t))


def test_add_noise_takes_levels_and_noise_as_given():
    x0, eps = np.ones((2, 3, 3, 4)), np.full((2, 3, 3, 4), 2.0)
    np.testing.assert_allclose(add_noise(x0, noise_levels=0.6, noise=eps).x_t, 0.8 + 1.2)
    np.testing.assert_allclose(add_noise(x0, noise_levels=[0.0, 1.0], noise=eps).x_t[:, 0, 0, 0], [1, 2])
    with pytest.raises(ValueError, match="3 noise levels for a batch of 2"):
        add_noise(x0, noise_levels=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="noise of shape"):
        add_noise(x0, noise=eps[:1])


def test_vp_noising_keeps_unit_variance():
    noised = add_noise(np.random.default_rng(0).normal(size=(4000, 4, 4, 4)).astype(np.float32))
    assert noised.x_t.std() == pytest.approx(1, abs=0.02)


images = hnp.arrays(np.float64, (3, 4, 5, 4), elements=st.floats(-50, 50, width=32))


@given(images, st.sampled_from([0.0, 50.0, 90.0, 97.3, 99.5, 100.0]), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_dynamic_thresholding_is_the_papers_clip_and_rescale(img, perc, bound):
    s = np.percentile(np.abs(img).reshape(3, -1), perc, axis=1).clip(min=bound)[:, None, None, None]
    expected = np.clip(img, -s, s) * bound / s
    np.testing.assert_allclose(dynamic_thresholding(img, perc, bound), expected, rtol=1e-9, atol=1e-12)
    as_tensor = dynamic_thresholding(torch.from_numpy(img).float(), perc, bound)
    np.testing.assert_allclose(as_tensor.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_dynamic_thresholding_leaves_samples_within_the_bound_alone():
    img = torch.rand(4, 4, 8, 8) * 2 - 1
    torch.testing.assert_close(dynamic_thresholding(img), img, rtol=0, atol=0)


def test_dynamic_thresholding_treats_each_sample_apart():
    img = torch.randn(4, 4, 8, 8)
    img[1] *= 100
    alone = torch.cat([dynamic_thresholding(sample[None]) for sample in img])
    torch.testing.assert_close(dynamic_thresholding(img), alone, rtol=0, atol=0)


@pytest.mark.parametrize(("arguments", "message"), [((101,), "percentile"), ((99, 0), "bound"), ((99, -1), "bound")])
def test_dynamic_thresholding_rejects_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        dynamic_thresholding(np.zeros((1, 4, 4, 4)), *arguments)


@pytest.mark.parametrize("numbers", [1, 2, 64, 256, 1000])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.995, 1.0])
def test_quantiles_of_rows_are_numpys(numbers, share):
    values = torch.randn(7, numbers, generator=torch.Generator().manual_seed(0))
    expected = np.quantile(values.double().numpy(), share, axis=1)
    np.testing.assert_allclose(quantile(values, share), expected, rtol=1e-5, atol=1e-6)
