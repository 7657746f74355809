"""The sample sheet: labelled images in titled sections, as one PNG that is fit to be shown."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentloom.files import atomic_path

CELL = 128
GAP = 12
MARGIN = 24
COLUMNS = 8
LABEL_LINES = 2
INK, SOFT, PAPER = (25, 25, 30), (110, 110, 120), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One strip of a section: a name at its start, and an image, uint8 (H, W, 3), for each label of the section."""

    name: str
    images: np.ndarray


@dataclass(frozen=True)
class Section:
    """Images under a title, one column per label; with several rows, images in a column belong together."""

    title: str
    labels: Sequence[str]
    rows: Sequence[Row]


def render_sheet(sections: Sequence[Section], footer: str) -> Image.Image:
    """Lay out the sections one below the other, ``COLUMNS`` images wide; labels are wrapped under their images."""
    title_font, font, small = _font(18, bold=True), _font(12), _font(11)
    label_height = LABEL_LINES * 14 + 6
    name_width = max((int(small.getlength(row.name)) + 8 for section in sections for row in section.rows), default=0)
    left = MARGIN + name_width
    width = left + COLUMNS * (CELL + GAP) - GAP + MARGIN
    strips = sum(
        -(-len(section.labels) // COLUMNS) * (len(section.rows) * (CELL + 4) + label_height) for section in sections
    )
    footer_lines = textwrap.wrap(footer, width=int((width - 2 * MARGIN) / 6.4))
    height = MARGIN + len(sections) * 44 + strips + 16 * len(footer_lines) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for section in sections:
        pen.text((MARGIN, y), section.title, fill=INK, font=title_font)
        y += 32
        for start in range(0, len(section.labels), COLUMNS):
            labels = section.labels[start : start + COLUMNS]
            for row in section.rows:
                pen.text((MARGIN, y + CELL // 2 - 7), row.name, fill=SOFT, font=small)
                for column in range(len(labels)):
                    image = Image.fromarray(row.images[start + column]).resize((CELL, CELL), Image.Resampling.LANCZOS)
                    sheet.paste(image, (left + column * (CELL + GAP), y))
                y += CELL + 4
            for column, label in enumerate(labels):
                lines = textwrap.wrap(label, width=20, max_lines=LABEL_LINES, placeholder="…") or [""]
                for number, line in enumerate(lines):
                    x = left + column * (CELL + GAP) + (CELL - font.getlength(line)) / 2
                    pen.text((x, y + number * 14), line, fill=INK, font=font)
            y += label_height
        y += 12
    for line in footer_lines:
        pen.text((MARGIN, y), line, fill=SOFT, font=small)
        y += 16
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG, atomically."""
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
