"""The samplers: against diffusers' DPM-Solver++, and against the exact solution where the data are Gaussian."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from latentloom.diffusion import (
    SAMPLERS,
    Diffuser,
    SamplingSettings,
    dynamic_thresholding,
    get_schedule,
    sampling_levels,
)

GAMMA = {"vp": lambda a: math.sqrt(1 - a**2), "linear": lambda a: 1 - a}
MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]).double(), torch.tensor([0.2, 0.5, 0.8, 1.5]).double()


def wavy(x_t, noise_level):
    return torch.tanh(x_t) * (1 - 0.5 * noise_level) + 0.2 * torch.sin(3 * x_t.roll(1, 3))


def noise(batch=3, size=8):
    return torch.randn(batch, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gaussian_denoiser(schedule):
    """E[x0 | x_t] for data that are N(MEAN, STD^2), channel by channel."""
    mean, variance = MEAN.view(1, -1, 1, 1), (STD**2).view(1, -1, 1, 1)

    def denoise(x_t, noise_level):
        gamma = GAMMA[schedule](noise_level)
        return mean + gamma * variance / (gamma**2 * variance + noise_level**2) * (x_t - gamma * mean)

    return denoise


def last(trajectory):
    *_, x = trajectory
    return x


@pytest.mark.parametrize("steps", [2, 3, 7, 20, 50])
def test_dpmpp_2m_goes_step_by_step_where_diffusers_does(steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="sample", algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    levels = (sigmas / (1 + sigmas**2).sqrt()).tolist()
    assert len(levels) == steps + 1 and levels[-1] == 0
    theirs = noise()
    trajectory = SAMPLERS["dpmpp_2m"](wavy, theirs, levels, get_schedule("vp"))
    for timestep, level, ours in zip(scheduler.timesteps, levels, trajectory, strict=False):
        theirs = scheduler.step(wavy(theirs, level), timestep, theirs).prev_sample.double()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)  # theirs computes in float32


def exact_solution(schedule, noise_level, z):
    """Where the ODE of the Gaussian is at a noise level, having been at z at level 1: its deviation has turned."""
    gamma, mean, std = GAMMA[schedule](noise_level), MEAN.view(1, -1, 1, 1), STD.view(1, -1, 1, 1)
    return gamma * mean + (gamma**2 * std**2 + noise_level**2).sqrt() * z


def error(sampler, schedule, levels):
    forward, z = get_schedule(schedule), noise()
    trajectory = SAMPLERS[sampler](gaussian_denoiser(schedule), exact_solution(schedule, levels[0], z), levels, forward)
    return (last(trajectory) - exact_solution(schedule, levels[-1], z)).abs().mean().item()


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_the_error_against_the_exact_solution_falls_with_the_samplers_order(schedule, sampler, order):
    """Between levels where lambda is finite, as an order is defined."""
    errors = [error(sampler, schedule, np.linspace(0.95, 0.05, steps + 1).tolist()) for steps in (80, 160, 320, 640)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("schedule", GAMMA)
def test_on_the_whole_trajectory_second_order_gets_with_twenty_steps_nearer_than_first_with_seventy(schedule):
    """From 1 to 0, where lambda is infinite at both ends, the error still falls much faster than that of ddim."""
    first, second = (
        {
            steps: error(sampler, schedule, sampling_levels(steps, get_schedule(schedule).spacing).tolist())
            for steps in (20, 70, 1000)
        }
        for sampler in SAMPLERS
    )
    assert second[20] < first[70]
    assert first[20] / first[1000] == pytest.approx(50, rel=0.2)
    assert second[20] / second[1000] > 50**1.2


@pytest.mark.parametrize("schedule", GAMMA)
@pytest.mark.parametrize("steps", [1, 2, 3, 70])
def test_both_samplers_ask_once_at_each_level_and_yield_each_after_the_first(schedule, steps):
    levels, forward = sampling_levels(steps).tolist(), get_schedule(schedule)
    for sampler in SAMPLERS.values():
        asked = []

        def denoise(x_t, noise_level, asked=asked):
            asked.append(noise_level)
            return wavy(x_t, noise_level)

        latents = list(sampler(denoise, noise(), levels, forward))
        assert asked == levels[:-1] and len(latents) == steps
        assert all(x.isfinite().all() and x.shape == noise().shape for x in latents)


@pytest.mark.parametrize("schedule", GAMMA)
def test_dpmpp_2m_is_first_order_from_pure_noise_and_to_no_noise(schedule):
    """From level 1 and in the step after it, since lambda is infinite there, and in the last: all of two steps."""
    levels, forward = sampling_levels(2).tolist(), get_schedule(schedule)
    first, second = (list(sampler(wavy, noise(), levels, forward)) for sampler in SAMPLERS.values())
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_diffuser_takes_the_sampler_of_its_settings_with_thresholded_predictions():
    labels = torch.zeros(3, 6, dtype=torch.float64)
    levels = sampling_levels(9).tolist()
    expected = last(
        SAMPLERS["dpmpp_2m"](
            lambda x_t, level: dynamic_thresholding(wavy(x_t, level), 90, 0.7), noise(), levels, get_schedule("vp")
        )
    )

    def denoiser(x_t, noise_levels, text):
        return wavy(x_t, noise_levels.view(-1, 1, 1, 1))

    settings = SamplingSettings(sampler="dpmpp_2m", threshold_percentile=90)
    diffuser = Diffuser(denoiser, 1.0, 9, settings=settings, bound=0.7)
    torch.testing.assert_close(diffuser.reverse_diffusion(noise(), labels), expected)
    np.testing.assert_allclose(  # the same trajectory in the other layout and kind
        diffuser.reverse_diffusion(noise().permute(0, 2, 3, 1).numpy(), labels.numpy()),
        expected.permute(0, 2, 3, 1).numpy(),
    )
    plain = Diffuser(denoiser, 1.0, 9, settings=settings.changed(sampler="ddim"), bound=0.7).reverse_diffusion(
        noise(), labels
    )
    assert not torch.allclose(plain, expected, atol=1e-3)
