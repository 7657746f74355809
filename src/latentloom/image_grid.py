"""Many images as one, with or without their captions."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels: the least width of an image with a caption
LINE = 14  # pixels from one line of a caption to the next
INK = (25, 25, 30)


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
        draw_caption(canvas, caption, (cell[0] // 2, height + LINE // 4), width=cell[0], lines=lines)
        cells.append(np.asarray(canvas))
    return image_grid(np.stack(cells))


def draw_caption(canvas: Image.Image, caption: str, top: tuple[int, int], *, width: int, lines: int) -> None:
    """Write a caption into ``canvas``, centred below the point ``top``, wrapped, and cut after so many lines."""
    drawing = ImageDraw.Draw(canvas)
    # 20 characters of this size are about as wide as a cell.
    wrapped = textwrap.wrap(caption, width=20 * width // CELL, max_lines=lines, placeholder="…")
    for number, line in enumerate(wrapped):
        drawing.text((top[0], top[1] + number * LINE), line, fill=INK, font=font(12), anchor="ma")


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all captions: matplotlib's, which every machine has."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
