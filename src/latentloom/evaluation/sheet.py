"""The sample sheet: labelled images in titled sections, as one PNG that is fit to be shown."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from latentloom.files import atomic_path
from latentloom.image_grid import CELL
from latentloom.lettering import INK, LINE, draw_caption, font

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 12
MARGIN = 24
COLUMNS = 8
LABEL_LINES = 3
LEFT = MARGIN + 56  # room for the names of rows
WIDTH = LEFT + COLUMNS * (CELL + GAP) - GAP + MARGIN
SOFT, PAPER = (110, 110, 120), (255, 255, 255)


@dataclass(frozen=True)
class Section:
    """Images under a title, one column per label; with several rows, images in a column belong together."""

    title: str  # above the images
    labels: Sequence[str]  # one per column, below the images
    rows: Mapping[str, Sequence[np.ndarray]]  # by name, the images of a row, each uint8 (H, W, 3)


def render_sheet(sections: Sequence[Section], footer: str) -> Image.Image:
    """Lay out the sections one below the other, ``COLUMNS`` images wide; labels are wrapped under their images."""
    strips = [_text("", height=MARGIN)]
    for section in sections:
        strips.append(_text(section.title, height=32, size=18, bold=True))
        for start in range(0, len(section.labels), COLUMNS):
            columns = slice(start, start + COLUMNS)
            strips += [_images(name, images[columns]) for name, images in section.rows.items()]
            strips.append(_labels(section.labels[columns]))
        strips.append(_text("", height=GAP))
    strips += [_text(line, height=16, ink=SOFT) for line in textwrap.wrap(footer, width=WIDTH // 7)]
    strips.append(_text("", height=MARGIN))
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def render_chart(plot: Callable[["Figure"], None], **settings: Any) -> Image.Image:
    """A figure of matplotlib's with ``settings`` that ``plot`` fills; the same whatever the user's own settings are."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure, png = Figure(**settings), io.BytesIO()
        plot(figure)
        figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, atomically."""
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _text(
    text: str, *, height: int, size: int = 11, bold: bool = False, ink: tuple[int, int, int] = INK
) -> Image.Image:
    strip = Image.new("RGB", (WIDTH, height), PAPER)
    ImageDraw.Draw(strip).text((MARGIN, 0), text, fill=ink, font=font(size, bold=bold))
    return strip


def _images(name: str, images: Sequence[np.ndarray]) -> Image.Image:
    """A row of images in the middle of their places, the longer side of each as long as its place is wide."""
    cells = []
    for image in images:
        height, width = (max(1, round(CELL * side / max(image.shape[:2]))) for side in image.shape[:2])
        cells.append(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    highest = max(cell.height for cell in cells)
    strip = Image.new("RGB", (WIDTH, highest + 4), PAPER)
    ImageDraw.Draw(strip).text((MARGIN, highest // 2 - 7), name, fill=SOFT, font=font(11))
    for column, cell in enumerate(cells):
        left = LEFT + column * (CELL + GAP)
        strip.paste(cell, (left + (CELL - cell.width) // 2, (highest - cell.height) // 2))
    return strip


def _labels(labels: Sequence[str]) -> Image.Image:
    strip = Image.new("RGB", (WIDTH, LABEL_LINES * LINE + 6), PAPER)
    for column, label in enumerate(labels):
        draw_caption(strip, label, (LEFT + column * (CELL + GAP) + CELL // 2, 0), width=CELL, lines=LABEL_LINES)
    return strip
