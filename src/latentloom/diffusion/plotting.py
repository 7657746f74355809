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
    """`(H, W, 3)`, `(3, H, W)` or `(H, W)`, as matplotlib wants it. Floats are read as [0, 1]."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3):
        raise ValueError(f"not an image: shape {tuple(image.shape)}; expected (H, W, 3) or (3, H, W)")
    return np.clip(image, 0, 1) if image.dtype.kind == "f" else image


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

    labels = [None] * len(images) if labels is None else labels
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    height = image_size * (1.2 if any(labels) else 1.0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * image_size, rows * height), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for image, label, ax in zip(images, labels, axes.flat[: len(images)], strict=True):
        imshow(image, label, ax=ax)
    if title:
        figure.suptitle(title)
    return figure
