"""Ways to walk down the noise levels, given a denoiser's guesses of the clean latent.

From each level to the next, a latent follows the ODE that links noise to data. With `gamma` the signal level,
`alpha` the noise level and `lambda = log(gamma / alpha)`, its exact solution is (Lu et al. 2022b, eq. 8)

    x_next = (alpha_next / alpha) x + alpha_next * integral of e^lambda x0_hat(lambda) d lambda

and the samplers differ in how they guess `x0_hat` between two levels where the denoiser was asked: `ddim`
takes it as constant, `dpmpp_2m` as a straight line through the last two guesses. Both ask the denoiser once a
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from latentloom.diffusion.noise import Schedule

Guess = Callable[[torch.Tensor, float], torch.Tensor]
Walk = Callable[[Guess, torch.Tensor, Sequence[float], Schedule], Iterator[torch.Tensor]]


def ddim(guess: Guess, x: torch.Tensor, levels: Sequence[float], schedule: Schedule) -> Iterator[torch.Tensor]:
    """First order: yields the latents `(B, C, H, W)` at each of `levels` after the first (Song et al. 2021).

    `guess(x_t, noise_level)` gives `x0_hat`; `x` lies at `levels[0]`; `levels` are the host's own numbers and
    fall, the last may be 0.
    """
    for now, then in pairwise(levels):
        x = _step(schedule, x, guess(x, now), now, then)
        yield x


def dpmpp_2m(guess: Guess, x: torch.Tensor, levels: Sequence[float], schedule: Schedule) -> Iterator[torch.Tensor]:
    """Second order: DPM-Solver++(2M) of Lu et al. 2022b, algorithm 2. Arguments and results as of `ddim`.

    A step is the first-order one, with the line through the last two guesses read at the middle of the step,
    in lambda: `x0_hat + h / (2 h_before) (x0_hat - x0_hat_before)`, `h` being how far lambda goes. A line needs
    two guesses at finite lambdas and a finite way to go, so the first step, the one after level 1 (where lambda
    is minus infinity) and the one to level 0 (infinity) are first order.
    """
    x0_before = lambda_before = None
    for now, then in pairwise(levels):
        x0_hat, lambda_now = guess(x, now), _half_log_snr(schedule, now)
        ahead = x0_hat
        if x0_before is not None and then > 0:
            # After a step from level 1, h_before is infinite and the line is flat.
            h, h_before = _half_log_snr(schedule, then) - lambda_now, lambda_now - lambda_before
            ahead = torch.lerp(x0_before, x0_hat, 1 + h / (2 * h_before))
        x = _step(schedule, x, ahead, now, then)
        x0_before, lambda_before = x0_hat, lambda_now
        yield x


SAMPLERS: dict[str, Walk] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def get_sampler(name: str) -> Walk:
    """Look a sampler up by name. Raises `ValueError` for an unknown one."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: allowed are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _step(schedule: Schedule, x: torch.Tensor, x0_hat: torch.Tensor, now: float, then: float) -> torch.Tensor:
    return x0_hat if then == 0 else schedule.step(x, x0_hat, now, then)


def _half_log_snr(schedule: Schedule, noise_level: float) -> float:
    """`lambda`, half the logarithm of the signal-to-noise ratio."""
    signal_level = schedule.signal_level(noise_level)
    return math.log(signal_level / noise_level) if signal_level > 0 else -math.inf
