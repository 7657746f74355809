"""Many images as one."""

import math

import numpy as np


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images (N, H, W, 3) uint8 side by side, row by row, as one image (rows * H, columns * W, 3).

    Args:
        images: at least one.
        columns: None makes the grid about square. Places left over in the last row are white.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, channels = images.shape[1:]
    grid = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    grid[: len(images)] = images
    return (
        grid.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )
