"""The science of latent diffusion, on torch and NumPy alone: noise, a denoiser, and the way back from noise.

`noise` says how latents become noise and what one step back is, `blocks` and `unet` build the denoiser,
`samplers` string steps into a walk, `diffuser` walks from noise to latents with them, `plotting` shows those.
`layouts` lets arrays and tensors in, in either layout.
"""

from latentloom.diffusion.blocks import (
    ConditionedLayer,
    CrossAttention,
    DownBlock,
    ResidualBlock,
    SpatialAttention,
    UpBlock,
    sinusoidal_embedding,
)
from latentloom.diffusion.diffuser import Diffuser
from latentloom.diffusion.layouts import detect_layout, to_nchw, to_tensor
from latentloom.diffusion.noise import (
    NOISE_LEVELS,
    SCHEDULES,
    NoisedLatents,
    Schedule,
    add_noise,
    dynamic_thresholding,
    get_schedule,
    noise_levels_from_uniform,
    sampling_levels,
)
from latentloom.diffusion.plotting import decode_latents, imshow, plot_images
from latentloom.diffusion.samplers import SAMPLERS, ddim, dpmpp_2m, get_sampler
from latentloom.diffusion.unet import TiledMerge, UNet, get_network

__all__ = [
    "NOISE_LEVELS",
    "SAMPLERS",
    "SCHEDULES",
    "ConditionedLayer",
    "CrossAttention",
    "Diffuser",
    "DownBlock",
    "NoisedLatents",
    "ResidualBlock",
    "Schedule",
    "SpatialAttention",
    "TiledMerge",
    "UNet",
    "UpBlock",
    "add_noise",
    "ddim",
    "decode_latents",
    "detect_layout",
    "dpmpp_2m",
    "dynamic_thresholding",
    "get_network",
    "get_sampler",
    "get_schedule",
    "imshow",
    "noise_levels_from_uniform",
    "plot_images",
    "sampling_levels",
    "sinusoidal_embedding",
    "to_nchw",
    "to_tensor",
]
