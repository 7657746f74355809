"""Many images as one, with or without their captions."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentloom.lettering import LINE, draw_caption

CELL = 128  # pixels: the least width of an image with a caption
LINES = 3  # of a caption
MARGIN = 4  # pixels between captions of neighbours


def image_grid(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Images, each (H, W, 3) uint8, side by side, row by row, as one image (rows * H, columns * W, 3).

    Images of several sizes lie in the middle of places as high as the highest and as wide as the widest.

    Args:
        images: at least one.
        columns: None makes the grid about square. Places left over in the last row are white.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    height, width, _ = np.max([image.shape for image in images], axis=0).tolist()
    grid = np.full((math.ceil(len(images) / columns) * height, columns * width, 3), 255, dtype=np.uint8)
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        own_height, own_width = image.shape[:2]
        top = row * height + (height - own_height) // 2
        left = column * width + (width - own_width) // 2
        grid[top : top + own_height, left : left + own_width] = image
    return grid


def captioned_grid(images: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """As `image_grid`, with each image's caption below it, in at most `LINES` lines."""
    height, width, _ = np.max([image.shape for image in images], axis=0).tolist()
    cell = (max(width, CELL), height + (LINES + 1) * LINE)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        canvas = Image.new("RGB", cell, "white")
        canvas.paste(Image.fromarray(image), ((cell[0] - image.shape[1]) // 2, (height - image.shape[0]) // 2))
        draw_caption(canvas, caption, (cell[0] // 2, height + LINE // 4), width=cell[0] - MARGIN, lines=LINES)
        cells.append(np.asarray(canvas))
    return image_grid(cells)
