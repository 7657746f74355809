"""How a clean latent becomes noise, and the one step that undoes a part of it.

A noise level `alpha` runs from 0 (the clean latent) to 1 (noise). A schedule says how much signal `gamma` is
left at each level, and so fixes both directions:

    forward:  x_t    = gamma(alpha) x0 + alpha eps
    reverse:  x_next = gamma(alpha_next) x0_hat + alpha_next eps_hat,   eps_hat = (x_t - gamma x0_hat) / alpha

Which levels training meets is a distribution, given as its inverse CDF: a function of uniform numbers.
Whoever draws those numbers decides how (stratified, on which device, from which seed). Sampling goes down
the same quantiles, from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from latentloom.diffusion.layouts import Array, to_tensor

Level: TypeAlias = float | torch.Tensor  # one noise level for all samples, or one for each


def per_sample(level: Level, like: torch.Tensor) -> Level:
    """Shape one level per sample, `(B,)`, `(B, 1)` or `(B, 1, 1, 1)`, so that it broadcasts over `like`."""
    if not isinstance(level, torch.Tensor) or level.ndim == 0:
        return level
    if level.numel() not in (1, like.shape[0]):
        raise ValueError(f"{level.numel()} noise levels for a batch of {like.shape[0]}: need one, or one per sample")
    return level.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Schedule:
    """How signal gives way to noise: both directions follow from the signal level.

    `signal_level(alpha)` is gamma in [0, 1] at noise level `alpha` in [0, 1]. `spacing` names the sequence of noise
    levels (see `sampling_levels`) that suits this schedule.
    """

    signal_level: Callable[[Level], Level]
    spacing: str

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, alpha: Level) -> torch.Tensor:
        """The forward process: `x_t = gamma x0 + alpha noise`. `alpha`: a number, or one level per sample."""
        alpha = per_sample(alpha, x0)
        return self.signal_level(alpha) * x0 + alpha * noise

    def step(self, x_t: torch.Tensor, x0_hat: torch.Tensor, alpha_now: Level, alpha_next: Level) -> torch.Tensor:
        """One deterministic reverse step, from noise level `alpha_now` > 0 to `alpha_next`.

        Song et al. 2021, DDIM, eq. 12 with sigma = 0, its noise estimate written out:
        `(alpha_next / alpha_now) x_t + (gamma_next - alpha_next gamma_now / alpha_now) x0_hat`.
        A step to 0 returns `x0_hat` itself.
        """
        if isinstance(alpha_now, (int, float)) and not alpha_now > 0:
            raise ValueError(f"a reverse step starts at a noise level above 0, not at {alpha_now}")
        alpha_now, alpha_next = per_sample(alpha_now, x_t), per_sample(alpha_next, x_t)
        ratio = alpha_next / alpha_now
        return ratio * x_t + (self.signal_level(alpha_next) - ratio * self.signal_level(alpha_now)) * x0_hat


def _variance_preserving(alpha: Level) -> Level:
    """`gamma = sqrt(1 - alpha^2)`: latents of unit variance keep it at every level. The usual choice."""
    return ((1 - alpha) * (1 + alpha)) ** 0.5  # the product keeps its digits near alpha = 1, where 1 - alpha^2 does not


def _linear(alpha: Level) -> Level:
    """`gamma = 1 - alpha`: a straight line from latent to noise, as in rectified flow (Liu et al. 2022)."""
    return 1 - alpha


SCHEDULES = {
    "vp": Schedule(_variance_preserving, spacing="cosine"),
    "linear": Schedule(_linear, spacing="uniform"),
}


def get_schedule(schedule: str | Schedule) -> Schedule:
    """Look a schedule up by name; a `Schedule` passes through. Raises `ValueError` for an unknown name."""
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: allowed are {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule]


def _cosine(u: torch.Tensor) -> torch.Tensor:
    """Even in the angle whose sine is alpha and whose cosine is the signal level of `vp`."""
    return torch.sin(0.5 * math.pi * u)


def _half_normal(u: torch.Tensor) -> torch.Tensor:
    """Mostly low noise: the angle is |N(0, 1)| cut off at 3, stretched so that 3 is a right angle."""
    x = math.sqrt(2) * torch.erfinv(u * math.erf(3 / math.sqrt(2)))
    return torch.sin((0.5 * math.pi / 3) * x.clamp(max=3.0))  # rounding can carry x a hair over 3


def _logit_normal(u: torch.Tensor) -> torch.Tensor:
    """Mostly the middle levels, where a prediction is neither trivial nor out of reach: their logit is N(0, 1)."""
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1))


def _beta(u: torch.Tensor) -> torch.Tensor:
    """Mostly low noise, as of Beta(1, 2.5), whose CDF `1 - (1 - alpha)^2.5` can be turned round."""
    return -torch.expm1(torch.log1p(-u) / 2.5)


NOISE_LEVELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cosine": _cosine,
    "uniform": torch.clone,
    "half_normal": _half_normal,
    "logit_normal": _logit_normal,
    "beta": _beta,
}


def noise_levels_from_uniform(u: Array, distribution: str = "cosine") -> Array:
    """Noise levels in [0, 1] from uniform numbers `u` in [0, 1]: the inverse CDF of the named distribution.

    `cosine`: `sin(pi u / 2)`. `uniform`: `u`. `half_normal`: `sin(pi x / 6)` with x a half-normal truncated
    at 3. `logit_normal`: `1 / (1 + exp(-z))` with z standard normal (Esser et al. 2024, section 3.1; under the
    schedule `linear` it is theirs). `beta`: Beta(1, 2.5). Any shape; the result has the shape, kind and dtype
    of `u`. Raises `ValueError` for an unknown name.
    """
    if distribution not in NOISE_LEVELS:
        allowed = ", ".join(NOISE_LEVELS)
        raise ValueError(f"unknown noise level distribution {distribution!r}: allowed are {allowed}")
    tensor, restore = to_tensor(u)
    return restore(NOISE_LEVELS[distribution](tensor))


def sampling_levels(steps: int, spacing: str = "cosine") -> np.ndarray:
    """The noise levels of `steps` reverse steps: `(steps + 1,)` float64, from 1 down to exactly 0.

    The network is asked at all but the last; step i goes from level i to level i + 1, and the last one
    returns its `x0_hat`. The levels are equal quantiles of the named noise-level distribution, so a network
    trained on it has seen every part of the trajectory equally often. `cosine` is also even in angle: under `vp`
    each step turns x_t by the same angle from noise towards signal, so no step is longer than another. Under
    `linear` the same signal-to-noise ratios come from nearly even levels: `uniform`. Starting at 1 is safe:
    reverse steps divide by the level they leave, never by the signal level, which is 0 there.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    levels = noise_levels_from_uniform(np.linspace(1.0, 0.0, steps + 1), spacing)
    levels[0], levels[-1] = 1.0, 0.0
    return levels


class NoisedLatents(NamedTuple):
    """Noised latents `x_t`, the `noise_levels` `(B,)` they are at, and the `noise` in them."""

    x_t: Array
    noise_levels: Array
    noise: Array


def add_noise(
    array_nhwc: Array,
    *,
    schedule: str | Schedule = "vp",
    noise_levels: str | float | Array = "cosine",
    noise: Array | None = None,
    generator: torch.Generator | None = None,
) -> NoisedLatents:
    """Noise a batch of clean latents, each sample to a level of its own.

    `array_nhwc`: `(B, H, W, C)` or `(B, C, H, W)`, array or tensor; the results are of the same kind and
    layout. `noise_levels`: the distribution to draw from, or the levels themselves, a number or one per sample.
    `noise`: standard normal, drawn from `generator` (on the latents' device) unless given.
    """
    schedule = get_schedule(schedule)
    x0, restore = to_tensor(array_nhwc)
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))  # half precision has too few levels to draw from
    batch = x0.shape[0]
    if isinstance(noise_levels, str):
        drawn = torch.rand(batch, generator=generator, device=x0.device, dtype=x0.dtype)
        alpha = noise_levels_from_uniform(drawn, noise_levels)
    else:
        levels = torch.as_tensor(noise_levels, device=x0.device, dtype=x0.dtype).reshape(-1)
        alpha = per_sample(levels, x0).reshape(-1).expand(batch)
    if noise is None:
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    else:
        eps = to_tensor(noise, device=x0.device, dtype=x0.dtype)[0]
        if eps.shape != x0.shape:
            raise ValueError(f"noise of shape {tuple(eps.shape)} for latents of shape {tuple(x0.shape)}")
    return NoisedLatents(restore(schedule.add_noise(x0, eps, alpha)), restore(alpha), restore(eps))


def dynamic_thresholding(img: Array, perc: float = 99.5, bound: float = 1.0) -> Array:
    """Pull a sample that guidance has blown up back into `[-bound, bound]` without flattening its extremes.

    Imagen (Saharia et al. 2022), section 2.3: for each sample, `s` is the `perc`-th percentile of `|img|`, or
    `bound` if that is more; values are clipped to `[-s, s]` and scaled by `bound / s`. A sample within the
    bound is left as it is. `bound` is 1 for data in [-1, 1]; for standardised latents take it from the data.
    `img`: `(B, ...)`, array or tensor, in any layout; the result is like it. Nothing waits for the device.
    """
    if not 0 <= perc <= 100:
        raise ValueError(f"perc is a percentile, from 0 to 100, not {perc}")
    if not bound > 0:
        raise ValueError(f"bound must be above 0, not {bound}")
    x, restore = to_tensor(img)
    s = quantile(x.abs().flatten(1), perc / 100)
    s = s.clamp(min=bound).reshape(-1, *[1] * (x.ndim - 1))
    return restore(x.clamp(-s, s) * (bound / s))


def quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The quantile `(N,)` of each row of `values` `(N, M)`, by linear interpolation between order statistics.

    `share` is from 0 to 1. The result is that of `torch.quantile`, which limits the number of values; and only the
    values from the quantile up are sorted.
    """
    position = share * (values.shape[1] - 1)
    below = math.floor(position)
    largest = values.topk(values.shape[1] - below, dim=1).values
    if position == below:
        return largest[:, -1]
    return torch.lerp(largest[:, -1], largest[:, -2], position - below)
