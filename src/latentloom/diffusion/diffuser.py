"""From pure noise to latents: guided, thresholded, deterministic reverse diffusion.

Each step asks the denoiser for the clean latent, once with the text and once without, and goes from the one
towards and past the other; pulls the guess back into range; and lets the sampler step to the next noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from latentloom.diffusion.layouts import Array, Layout, to_nchw, to_tensor
from latentloom.diffusion.noise import Schedule, dynamic_thresholding, get_schedule, sampling_levels
from latentloom.diffusion.samplers import get_sampler

Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Diffuser:
    """Draws latents with a denoiser `(x_t, noise_levels, text_embeddings) -> x0_hat`, such as the `UNet`.

    class_guidance:     w. 1 follows the text as trained, above 1 exaggerates it, 0 ignores it. 1 and 0 ask the
                        denoiser once a sample and step; all others twice, in one batch.
    diffusion_steps:    K, the number of noise levels the denoiser is asked at.
    schedule:           the one the denoiser was trained with.
    perc, bound:        dynamic thresholding of each guess; `perc=None` leaves it out. `bound` is in units of
                        the latents: take it from the training latents (standardised ones reach well beyond 1).
    spacing:            how the noise levels fall, a name from `NOISE_LEVELS`; None: as suits the schedule.
    latent_channels:    C, to tell the layouts apart.
    autocast_dtype:     such as `torch.bfloat16`: the denoiser then runs under autocast, the rest as before.
    progress:           called after each step with (steps done, steps in all); True prints a line that counts.
    sampler:            how to get from level to level, a name from `SAMPLERS`: `ddim`, of first order, or
                        `dpmpp_2m`, of second.
    guidance_interval:  `(low, high)`, the noise levels at which guidance acts; at all others the guess is the
                        plain conditional one, for half the work (Kynkäänniemi et al. 2024).
    guidance_rescale:   phi, from 0 to 1: how far the guided guess is scaled back to the standard deviation of
                        the conditional one, sample by sample. Lin et al. 2024, eq. 15 and 16, who rescale what
                        the network predicts; here that is x0_hat.

    Labels are text embeddings `(B, text_dim)`; an embedding of zeros is the null label. Inputs move to the
    denoiser's device, results back to where the inputs came from.
    """

    denoiser: Denoiser
    class_guidance: float
    diffusion_steps: int
    schedule: str | Schedule = "vp"
    perc: float | None = 99.5
    bound: float = 1.0
    spacing: str | None = None
    latent_channels: int = 4
    autocast_dtype: torch.dtype | None = None
    progress: Callable[[int, int], None] | bool | None = None
    sampler: str = "ddim"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        self.schedule = get_schedule(self.schedule)
        if not np.isfinite(self.class_guidance):
            raise ValueError(f"class_guidance must be a finite number, not {self.class_guidance}")
        get_sampler(self.sampler)
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval is (low, high) with 0 <= low <= high <= 1, not ({low}, {high})")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale goes from 0 to 1, not {self.guidance_rescale}")
        if self.perc is not None and not 0 <= self.perc <= 100:
            raise ValueError(f"perc is a percentile, from 0 to 100, or None, not {self.perc}")
        if not self.bound > 0:
            raise ValueError(f"bound must be above 0, not {self.bound}")
        self.noise_levels()  # refuses a wrong number of steps or an unknown spacing

    def noise_levels(self) -> np.ndarray:
        """The walk of noise levels, `(diffusion_steps + 1,)`, from 1 to 0."""
        return sampling_levels(self.diffusion_steps, self.spacing or self.schedule.spacing)

    def predict_x_zero(
        self, x_t: Array, labels: Array, noise_level_scalar: float, *, layout: Layout | None = None
    ) -> Array:
        """The guided guess of the clean latents, before thresholding, in the layout and kind of `x_t`.

        Classifier-free guidance (Ho & Salimans 2022) in terms of x0: `w x0(labels) + (1 - w) x0(null)`.
        `x_t`: `(B, C, H, W)` or `(B, H, W, C)`; `labels`: `(B, text_dim)`; one noise level for all samples.
        """
        x, text, restore = self._admit(x_t, labels, layout)
        with torch.no_grad():
            return restore(self._guided(x, text, float(noise_level_scalar)))

    def reverse_diffusion(self, seeds_nhwc: Array, labels_np: Array, *, layout: Layout | None = None) -> Array:
        """Denoise standard normal seeds into latents that fit the labels, like the seeds in layout and kind.

        `seeds_nhwc`: `(B, H, W, C)` or `(B, C, H, W)`; `labels_np`: `(B, text_dim)`; arrays or tensors. The
        same seeds and labels give the same latents; a sample does not depend on the others in its batch.
        """
        x, text, restore = self._admit(seeds_nhwc, labels_np, layout)

        def guess(x_t: torch.Tensor, noise_level: float) -> torch.Tensor:
            x0_hat = self._guided(x_t, text, noise_level)
            return x0_hat if self.perc is None else dynamic_thresholding(x0_hat, self.perc, self.bound)

        with torch.no_grad():
            levels = self.noise_levels().tolist()  # numbers of the host: no step waits for the device
            walk = get_sampler(self.sampler)(guess, x, levels, self.schedule)
            for step, latents in enumerate(walk, start=1):
                x = latents
                self._report(step)
            return restore(x)

    def _guided(self, x: torch.Tensor, text: torch.Tensor, noise_level: float) -> torch.Tensor:
        low, high = self.guidance_interval
        w = self.class_guidance if low <= noise_level <= high else 1
        if w == 0:
            return self._denoise(x, torch.zeros_like(text), noise_level)
        if w == 1:
            return self._denoise(x, text, noise_level)
        both = torch.cat([text, torch.zeros_like(text)])
        with_text, without = self._denoise(torch.cat([x, x]), both, noise_level).chunk(2)
        guided = w * with_text + (1 - w) * without
        return _rescale(guided, with_text, self.guidance_rescale) if self.guidance_rescale else guided

    def _denoise(self, x: torch.Tensor, text: torch.Tensor, noise_level: float) -> torch.Tensor:
        levels = x.new_full((x.shape[0],), noise_level)
        with self._autocast(x.device.type):
            return self.denoiser(x, levels, text).to(x.dtype)

    def _autocast(self, device_type: str) -> AbstractContextManager:
        return torch.autocast(device_type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def _admit(
        self, latents: Array, labels: Array, layout: Layout | None
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], Array]]:
        """Latents and labels on the denoiser's device in its precision (float32 at least), and the way back.

        A denoiser without parameters takes them as they come.
        """
        parameters = getattr(self.denoiser, "parameters", lambda: iter(()))()
        home = next((p for p in parameters if p.is_floating_point()), None)
        device, dtype = None, None
        if home is not None:
            device, dtype = home.device, torch.promote_types(home.dtype, torch.float32)
        x, restore = to_nchw(latents, latent_channels=self.latent_channels, layout=layout, device=device, dtype=dtype)
        text, _ = to_tensor(labels, device=x.device, dtype=dtype)
        if text.ndim != 2 or text.shape[0] != x.shape[0]:
            raise ValueError(
                f"labels must be text embeddings ({x.shape[0]}, text_dim), one a sample; "
                f"their shape is {tuple(text.shape)}"
            )
        return x, text, restore

    def _report(self, step: int) -> None:
        if callable(self.progress):
            self.progress(step, self.diffusion_steps)
        elif self.progress:
            end = "\n" if step == self.diffusion_steps else ""
            print(f"\rreverse diffusion: step {step} of {self.diffusion_steps}", end=end, flush=True)


def _rescale(guided: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """`phi` of the way from `guided` to `guided` at the standard deviation of `conditional`, for each sample."""
    wanted, given = (x0_hat.flatten(1).std(1, correction=0) for x0_hat in (conditional, guided))
    factor = torch.where(given > 0, wanted / given, 1.0)
    return guided * (1 + phi * (factor - 1)).reshape(-1, 1, 1, 1)
