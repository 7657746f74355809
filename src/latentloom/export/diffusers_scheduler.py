"""The schedule, and the settings of samples, as a scheduler of diffusers: its config is all that it is asked for."""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config


class LatentLoomScheduler(SchedulerMixin, ConfigMixin):
    """What the pipeline samples with where a call says nothing.

    schedule:      how signal gives way to noise: `vp` or `linear`.
    latent_bound:  of dynamic thresholding, in standardised latents.
    sampling:      a `SamplingSettings`, by names.
    """

    @register_to_config
    def __init__(self, schedule: str, latent_bound: float, sampling: dict[str, Any]):
        pass
