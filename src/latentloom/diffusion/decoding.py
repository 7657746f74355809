"""Between pixels and latents, by a VAE: encode bytes; undo the standardisation, decode, round to bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latentloom.diffusion.layouts import Array, Layout, home_of, to_nchw


def encode_pixels(pixels: np.ndarray, *, vae: Any) -> dict[str, torch.Tensor]:
    """Encode images, `(B, H, W, 3)` uint8, into the VAE's own latents: `mean` and, of a distribution, `std`.

    Each is `(B, C, h, w)`, float32, on the CPU. `vae.encode(images)` takes images in [-1, 1] and gives what diffusers'
    `AutoencoderKL` or `AutoencoderTiny` does.
    """
    device, dtype = home_of(vae)
    images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).to(dtype)
    encoded = vae.encode(images.contiguous(memory_format=torch.channels_last))
    if hasattr(encoded, "latents"):
        return {"mean": encoded.latents.float().cpu()}
    posterior = encoded.latent_dist
    return {"mean": posterior.mean.float().cpu(), "std": posterior.std.float().cpu()}


def decode_latents(
    latents: Array,
    std_latent: float | Array,
    *,
    mean_latent: float | Array = 0.0,
    vae: Any,
    latent_channels: int = 4,
    layout: Layout | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Decode standardised latents into images: `(B, H, W, 3)` uint8.

    `latents`: `(B, h, w, C)` or `(B, C, h, w)`, array or tensor, standardised per channel; they are brought
    back by `latents * std_latent + mean_latent`, each a number or one per channel `(C,)`. `vae.decode(z)` takes
    `(b, C, h, w)` and gives images in [-1, 1], as a tensor `(b, 3, H, W)` or with that as its `.sample`; it
    is called with at most `batch_size` latents at once. Raises `ValueError` if a decoded image is not finite.
    """
    device, dtype = home_of(vae)
    z, _ = to_nchw(latents, latent_channels=latent_channels, layout=layout, device=device, dtype=torch.float32)
    std, mean = (torch.as_tensor(value).to(z).reshape(-1, 1, 1) for value in (std_latent, mean_latent))
    z = (z * std + mean).to(dtype)
    with torch.no_grad():
        return np.concatenate([_to_bytes(_decode(vae, part)) for part in z.split(batch_size)])


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    decoded = vae.decode(latents.contiguous(memory_format=torch.channels_last))
    return (decoded if isinstance(decoded, torch.Tensor) else decoded.sample).float()


def _to_bytes(pixels: torch.Tensor) -> np.ndarray:
    """`(b, 3, H, W)` in [-1, 1] as `(b, H, W, 3)` uint8; values beyond the range saturate."""
    if not pixels.isfinite().all():
        raise ValueError("the decoded images hold values that are not finite: look for them in the latents")
    rounded = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(0, 2, 3, 1).cpu().numpy()
