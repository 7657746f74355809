"""Many images as one, with or without their captions."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentloom.lettering import LINE, draw_caption

CELL = 128  # pixels: the least width of an image with a caption
MARGIN = 4  # pixels between captions of neighbours


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


def captioned_grid(images: np.ndarray, captions: Sequence[str], *, lines: int = 3) -> np.ndarray:
    """As `image_grid`, with each image's caption below it, in at most so many lines."""
    height, width = images.shape[1:3]
    cell = (max(width, CELL), height + (lines + 1) * LINE)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        canvas = Image.new("RGB", cell, "white")
        canvas.paste(Image.fromarray(image), ((cell[0] - width) // 2, 0))
        draw_caption(canvas, caption, (cell[0] // 2, height + LINE // 4), width=cell[0] - MARGIN, lines=lines)
        cells.append(np.asarray(canvas))
    return image_grid(np.stack(cells))
