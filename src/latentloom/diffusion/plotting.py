"""Images in a notebook: one, or a grid of them with labels.

Matplotlib is imported only when something is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from latentloom.diffusion.layouts import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    """Show one image, `(H, W, 3)` or `(3, H, W)`, uint8 or floats in [0, 1]. Returns the `Axes`."""
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
    """Show a grid of images, row by row, each under its label if there are labels. Returns the `Figure`.

    `columns`: by default what makes the grid about square. `image_size`: inches per image.
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
