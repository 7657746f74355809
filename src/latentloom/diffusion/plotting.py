"""From latents to something to look at: decode to pixels, lay the pixels out on a page.

Images are `(B, H, W, 3)` uint8. Matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from latentloom.diffusion.layouts import Array, Layout, to_nchw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    back by `latents * std_latent + mean_latent`, each a number or one a channel `(C,)`. `vae.decode(z)` takes
    `(b, C, h, w)` and gives images in [-1, 1], as a tensor `(b, 3, H, W)` or with that as its `.sample`; it
    is called with at most `batch_size` latents at once. Raises `ValueError` if a decoded image is not finite.
    """
    home = next(iter(vae.parameters()), None) if hasattr(vae, "parameters") else None
    device, dtype = (None, torch.float32) if home is None else (home.device, home.dtype)
    z, _ = to_nchw(latents, latent_channels=latent_channels, layout=layout, device=device, dtype=torch.float32)
    std, mean = _per_channel(std_latent, "std_latent", z), _per_channel(mean_latent, "mean_latent", z)
    z = (z * std + mean).to(dtype)
    pages = []
    with torch.no_grad():
        for part in z.split(batch_size):
            decoded = vae.decode(part.contiguous())
            pixels = decoded if isinstance(decoded, torch.Tensor) else decoded.sample
            pages.append(pixels.float().permute(0, 2, 3, 1).cpu())
    images = torch.cat(pages).numpy()
    if not np.isfinite(images).all():
        raise ValueError("the decoded images hold values that are not finite: look for them in the latents")
    return np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8)


def _per_channel(value: float | Array, name: str, latents: torch.Tensor) -> torch.Tensor:
    statistic = torch.as_tensor(value, dtype=latents.dtype, device=latents.device).reshape(-1)
    if statistic.numel() not in (1, latents.shape[1]):
        raise ValueError(
            f"{name} must be a number, or one for each of the {latents.shape[1]} channels; "
            f"{statistic.numel()} were given"
        )
    return statistic.reshape(1, -1, 1, 1)


def _displayable(image: Array) -> np.ndarray:
    """`(H, W, 3)`, `(3, H, W)`, or one channel or none: as matplotlib wants it. Floats are read as [0, 1]."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)):
        raise ValueError(f"not an image: shape {tuple(pixels.shape)}; expected (H, W, 3) or (3, H, W)")
    return np.clip(pixels, 0, 1) if pixels.dtype.kind == "f" else pixels


def imshow(image: Array, label: str | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw one image, `(H, W, 3)` or `(3, H, W)`, uint8 or floats in [0, 1]. Returns the `Axes`."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(3, 3))[1]
    ax.imshow(_displayable(image), cmap="gray", interpolation="nearest")
    ax.set_axis_off()
    if label:
        ax.set_title(label, fontsize=8, wrap=True)
    return ax


def plot_images(
    images: Array | Sequence[Array],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    image_size: float = 1.6,
    title: str | None = None,
) -> Figure:
    """Draw a grid of images, row by row, each under its label if there are labels. Returns the `Figure`.

    `columns`: by default what makes the grid about square. `image_size`: inches a picture.
    """
    import matplotlib.pyplot as plt

    count = len(images)
    if count == 0:
        raise ValueError("no images to plot")
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images")
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    height = image_size * (1.2 if labels is not None else 1.0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * image_size, rows * height), squeeze=False, layout="constrained"
    )
    for i, ax in enumerate(axes.flat):
        if i < count:
            imshow(images[i], labels[i] if labels is not None else None, ax=ax)
        else:
            ax.set_axis_off()
    if title:
        figure.suptitle(title)
    return figure
