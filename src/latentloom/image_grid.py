"""Many images as one, with or without their captions."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentloom.lettering import LINE, draw_caption

CELL = 128  # pixels: the least width of an image with a caption
MARGIN = 4  # pixels between captions of neighbours


def image_grid(images: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Images (H, W, 3) uint8 side by side, row by row, as one image (rows * H, columns * W, 3).

    Args:
        images: at least one; smaller ones are centred on white in a place as high as the highest and as wide as the
            widest.
        columns: None makes the grid about square. Places left over in the last row are white.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, channels = np.max([image.shape for image in images], axis=0).tolist()
    grid = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    for place, image in zip(grid, images, strict=False):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        place[top : top + image.shape[0], left : left + image.shape[1]] = image
    return (
        grid.reshape(rows, columns, height, width, channels)
        .swapaxes(1, 2)
        .reshape(rows * height, columns * width, channels)
    )


def captioned_grid(images: Sequence[np.ndarray], captions: Sequence[str], *, lines: int = 3) -> np.ndarray:
    """As `image_grid`, with each image's caption below it, in at most so many lines."""
    height, width, _ = np.max([image.shape for image in images], axis=0).tolist()
    cell = (max(width, CELL), height + (lines + 1) * LINE)
    cells = []
    for image, caption in zip(images, captions, strict=True):
        canvas = Image.new("RGB", cell, "white")
        canvas.paste(Image.fromarray(image), ((cell[0] - image.shape[1]) // 2, (height - image.shape[0]) // 2))
        draw_caption(canvas, caption, (cell[0] // 2, height + LINE // 4), width=cell[0] - MARGIN, lines=lines)
        cells.append(np.asarray(canvas))
    return image_grid(cells)
