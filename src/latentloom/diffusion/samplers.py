"""Samplers: how a latent gets from noise level to noise level, given a denoiser's predictions of the clean latent.

From each level to the next, a latent follows the ODE that links noise to data. With `gamma` the signal level,
`alpha` the noise level and `lambda = log(gamma / alpha)`, its exact solution is (Lu et al. 2022b, eq. 8)

    x_next = (alpha_next / alpha) x + alpha_next * integral of e^lambda x0_hat(lambda) d lambda

and the samplers differ in what they take for `x0_hat` between two levels where the denoiser was asked: `ddim` a
constant, `dpmpp_2m` a straight line through the last two predictions. Both ask the denoiser once per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from latentloom.diffusion.noise import Schedule

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
Sampler = Callable[[Denoise, torch.Tensor, Sequence[float], Schedule], Iterator[torch.Tensor]]


def ddim(denoise: Denoise, x: torch.Tensor, levels: Sequence[float], schedule: Schedule) -> Iterator[torch.Tensor]:
    """First order: yields the latents `(B, C, H, W)` at each of `levels` after the first (Song et al. 2021).

    `denoise(x_t, noise_level)` gives `x0_hat`; `x` lies at `levels[0]`; `levels` are the host's own numbers and
    fall, the last may be 0.
    """
    for level, next_level in pairwise(levels):
        x = _step(schedule, x, denoise(x, level), level, next_level)
        yield x


def dpmpp_2m(denoise: Denoise, x: torch.Tensor, levels: Sequence[float], schedule: Schedule) -> Iterator[torch.Tensor]:
    """Second order: DPM-Solver++(2M) of Lu et al. 2022b, algorithm 2. Arguments and results as of `ddim`.

    A step is the first-order one, with the line through the last two predictions read at the middle of the step,
    in lambda: `D = x0_hat + h / (2 h_last) (x0_hat - x0_last)`, `h` being how far lambda goes. A line needs two
    predictions at finite lambdas and a finite distance, so the first step, the one after level 1 (where lambda is
    minus infinity) and the one to level 0 (infinity) are first order.
    """
    x0_last = lambda_last = None
    for level, next_level in pairwise(levels):
        x0_hat, lambda_ = denoise(x, level), _half_log_snr(schedule, level)
        extrapolated = x0_hat
        if x0_last is not None and next_level > 0:
            # After a step from level 1, h_last is infinite and the line is flat.
            h, h_last = _half_log_snr(schedule, next_level) - lambda_, lambda_ - lambda_last
            extrapolated = torch.lerp(x0_last, x0_hat, 1 + h / (2 * h_last))
        x = _step(schedule, x, extrapolated, level, next_level)
        x0_last, lambda_last = x0_hat, lambda_
        yield x


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def _step(schedule: Schedule, x: torch.Tensor, x0_hat: torch.Tensor, level: float, next_level: float) -> torch.Tensor:
    return x0_hat if next_level == 0 else schedule.step(x, x0_hat, level, next_level)


def _half_log_snr(schedule: Schedule, noise_level: float) -> float:
    """`lambda`, half the logarithm of the signal-to-noise ratio."""
    signal_level = schedule.signal_level(noise_level)
    return math.log(signal_level / noise_level) if signal_level > 0 else -math.inf
