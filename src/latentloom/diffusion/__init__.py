"""The science of latent diffusion, on torch and NumPy alone: noise, a denoiser, and the way back from noise.

`noise` says how latents become noise and what one step back is; `embeddings`, `blocks` and `unet` build the denoiser,
with `fast` for quick forms of two layers, and `text` is what it is told of captions; `samplers` string steps into a
trajectory; `diffuser` follows one from noise to latents with `sampling_settings`; `interpolation` says what lies
between two samples; `decoding` makes pixels of latents, and `plotting` shows them. `layouts` takes arrays and tensors
in either layout.

`from latentloom.diffusion import Diffuser` works for each name below; a module is imported when a name of it is first
asked for, so that reading settings does not load torch. The names `seeds_nhwc`, `labels_np`, `array_nhwc`, `perc`,
`noise_level_scalar`, `class_guidance` and `std_latent` are those of the walkthrough that this package grew from, and
are kept though the arguments accept more than they say.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "blocks": ["ConditionedLayer", "CrossAttention", "DownBlock", "ResidualBlock", "SpatialAttention", "UpBlock"],
    "decoding": ["decode_latents"],
    "diffuser": ["Diffuser"],
    "embeddings": ["sinusoidal_embedding"],
    "interpolation": ["between_noise", "between_texts"],
    "layouts": ["detect_layout", "to_nchw", "to_tensor"],
    "noise": [
        "NOISE_LEVELS",
        "SCHEDULES",
        "NoisedLatents",
        "Schedule",
        "add_noise",
        "dynamic_thresholding",
        "get_schedule",
        "noise_levels_from_uniform",
        "sampling_levels",
    ],
    "plotting": ["imshow", "plot_images"],
    "text": ["Text"],
    "samplers": ["SAMPLERS", "ddim", "dpmpp_2m"],
    "sampling_settings": ["SampleRequest", "SamplingSettings"],
    "unet": ["TiledMerge", "UNet", "get_network"],
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
