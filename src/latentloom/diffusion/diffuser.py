"""From pure noise to latents: guided, thresholded, deterministic reverse diffusion.

Each step asks the denoiser for the clean latent, once with the text and once without, and extrapolates from the one
without towards and past the one with text; pulls the prediction back into range; and lets the sampler step to the next
noise level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import torch

from latentloom.diffusion.layouts import Array, Layout, home_of, to_nchw, to_tensor
from latentloom.diffusion.noise import Schedule, dynamic_thresholding, get_schedule, sampling_levels
from latentloom.diffusion.samplers import SAMPLERS
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.diffusion.text import Labels, Text, concatenate, no_text

Denoiser = Callable[[torch.Tensor, torch.Tensor, Labels], torch.Tensor]
OnPrediction = Callable[[int, Array], None]


class Diffuser:
    """Generates latents with a denoiser `(x_t, noise_levels, text_embeddings) -> x0_hat`, such as the `UNet`.

    class_guidance:     w, instead of that of `settings`. 1 follows the text as trained, above 1 exaggerates it, 0
                        ignores it. 1 and 0 ask the denoiser once per sample and step; all others twice, in one batch.
    diffusion_steps:    the number of noise levels that the denoiser is asked at, instead of that of `settings`.
    settings:           all that a user chooses. Its `precision` is for the caller, who knows the device: see
                        `autocast_dtype`.
    schedule:           the one the denoiser was trained with.
    bound:              of dynamic thresholding, in units of the latents: take it from the training latents
                        (standardised ones reach well beyond 1).
    latent_channels:    C, to tell the layouts apart.
    autocast_dtype:     such as `torch.bfloat16`: the denoiser then runs under autocast, the rest as before.

    Labels are text embeddings `(B, text_dim)`, an embedding of zeros being the null label; or a `Text` of these and
    token states, for a denoiser that reads them, which gets labels in the form that came in. Inputs move to the
    denoiser's device, results back to where the inputs came from. Raises `ValueError` naming a wrong argument.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        class_guidance: float | None = None,
        diffusion_steps: int | None = None,
        *,
        settings: SamplingSettings | None = None,
        schedule: str | Schedule = "vp",
        bound: float = 1.0,
        latent_channels: int = 4,
        autocast_dtype: torch.dtype | None = None,
    ):
        self.denoiser = denoiser
        self.settings = (settings or SamplingSettings()).changed(
            class_guidance=class_guidance, diffusion_steps=diffusion_steps
        )
        self.schedule = get_schedule(schedule)
        self.bound = bound
        self.latent_channels = latent_channels
        self.autocast_dtype = autocast_dtype
        self.noise_levels = sampling_levels(self.settings.diffusion_steps, self.schedule.spacing)

    def predict_x_zero(
        self,
        x_t: Array,
        labels: Array | Text,
        noise_level_scalar: float,
        *,
        layout: Layout | None = None,
        negative: Array | Text | None = None,
    ) -> Array:
        """The guided prediction of the clean latents, before thresholding, in the layout and kind of `x_t`.

        Classifier-free guidance (Ho & Salimans 2022) in terms of x0: `w x0(labels) + (1 - w) x0(negative)`.
        `x_t`: `(B, C, H, W)` or `(B, H, W, C)`; `labels`, and `negative`, what to guide away from, None: the null
        label: `(B, text_dim)` or a `Text`; one noise level for all samples.
        """
        x, text, restore = self._to_device(x_t, labels, layout)
        away = self._away(x_t, text, negative, layout)
        with torch.no_grad():
            return restore(self._predict(x, text, away, float(noise_level_scalar)))

    def reverse_diffusion(
        self,
        seeds_nhwc: Array,
        labels_np: Array | Text,
        *,
        layout: Layout | None = None,
        negative: Array | Text | None = None,
        start: Array | None = None,
        strength: float = 1.0,
        on_prediction: OnPrediction | None = None,
    ) -> Array:
        """Denoise standard normal seeds into latents that fit the labels, like the seeds in layout and kind.

        `seeds_nhwc`: `(B, H, W, C)` or `(B, C, H, W)`; `labels_np`: `(B, text_dim)` or a `Text`; arrays or
        tensors. The same seeds and labels give the same latents; a sample does not depend on the others in its batch.

        `negative`: labels to guide away from, instead of the null label.
        `start`: clean latents in the form of the seeds, from which samples begin instead of noise alone (SDEdit, Meng
        et al. 2022): they are noised with the seeds to the level that leaves the last `strength`, from 0 to 1, of the
        steps, at least one above 0. 1 is sampling from the seeds alone, 0 returns `start`.
        `on_prediction`: called at each step with its number, from 0, and the prediction of the clean latents that the
        step goes towards.
        """
        x, text, restore = self._to_device(seeds_nhwc, labels_np, layout)
        away = self._away(seeds_nhwc, text, negative, layout)
        levels = self._levels(strength)
        if start is not None:
            x = self.schedule.add_noise(self._to_device(start, labels_np, layout)[0], x, levels[0])
        elif strength != 1:
            raise ValueError(f"strength = {strength}: below 1 it needs start, the latents to begin from")
        percentile, steps = self.settings.threshold_percentile, itertools.count()

        def denoise(x_t: torch.Tensor, noise_level: float) -> torch.Tensor:
            x0_hat = self._predict(x_t, text, away, noise_level)
            if percentile is not None:
                x0_hat = dynamic_thresholding(x0_hat, percentile, self.bound)
            if on_prediction is not None:
                on_prediction(next(steps), restore(x0_hat))
            return x0_hat

        sampler = SAMPLERS[self.settings.sampler]
        with torch.no_grad():
            for latents in sampler(denoise, x, levels, self.schedule):
                x = latents
            return restore(x)

    def _levels(self, strength: float) -> list[float]:
        """The last `strength` of the noise levels, as numbers of the host: no step waits for the device."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength = {strength}: must be a number, from 0 to 1")
        steps = max(round(strength * self.settings.diffusion_steps), int(strength > 0))
        return self.noise_levels.tolist()[self.settings.diffusion_steps - steps :]

    def _away(self, latents: Array, text: Labels, negative: Array | Text | None, layout: Layout | None) -> Labels:
        return no_text(text) if negative is None else self._to_device(latents, negative, layout)[1]

    def _predict(self, x: torch.Tensor, text: Labels, away: Labels, noise_level: float) -> torch.Tensor:
        """The prediction of x0, guided `away`, or the plain one where guidance changes nothing or is off."""
        low, high = self.settings.guidance_interval
        w = self.settings.class_guidance if low <= noise_level <= high else 1
        if w == 0:
            return self._ask(x, away, noise_level)
        if w == 1:
            return self._ask(x, text, noise_level)
        both = concatenate([text, away])
        conditional, unconditional = self._ask(torch.cat([x, x]), both, noise_level).chunk(2)
        guided = w * conditional + (1 - w) * unconditional
        phi = self.settings.guidance_rescale
        return _rescale(guided, conditional, phi) if phi else guided

    def _ask(self, x: torch.Tensor, text: Labels, noise_level: float) -> torch.Tensor:
        levels = x.new_full((x.shape[0],), noise_level)
        with torch.autocast(x.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext():
            return self.denoiser(x, levels, text).to(x.dtype)

    def _to_device(
        self, latents: Array, labels: Array | Text, layout: Layout | None
    ) -> tuple[torch.Tensor, Labels, Callable[[torch.Tensor], Array]]:
        """Latents and labels on the denoiser's device in its precision (float32 at least), and the way back."""
        device, dtype = home_of(self.denoiser)
        if dtype:
            dtype = torch.promote_types(dtype, torch.float32)
        x, restore = to_nchw(latents, latent_channels=self.latent_channels, layout=layout, device=device, dtype=dtype)
        if isinstance(labels, Text):
            if len(labels) != len(x):
                raise ValueError(f"labels must be one per sample: there are {len(labels)} for {len(x)} samples")
            return x, labels.to(x.device, dtype), restore
        text, _ = to_tensor(labels, device=x.device, dtype=dtype)
        if text.ndim != 2 or text.shape[0] != x.shape[0]:
            raise ValueError(
                f"labels must be text embeddings ({x.shape[0]}, text_dim), one per sample; "
                f"their shape is {tuple(text.shape)}"
            )
        return x, text, restore


def _rescale(guided: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """`phi` of the way from `guided` to `guided` at the standard deviation of `conditional`, for each sample.

    Lin et al. 2024, eq. 15 and 16, who rescale what the network predicts; here that is x0_hat.
    """
    wanted, given = (x0_hat.flatten(1).std(1, correction=0) for x0_hat in (conditional, guided))
    factor = torch.where(given > 0, wanted / given, 1.0)
    return guided * (1 + phi * (factor - 1)).reshape(-1, 1, 1, 1)
