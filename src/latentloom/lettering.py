"""Captions written into pictures: in a font that has their characters, and in lines no wider than their place.

matplotlib's font, which every machine has, knows the alphabets from Latin to Arabic. Packages of the extra `fonts`
bring Chinese, Japanese, Korean, Thai and Devanagari; any other that is installed and tells its fonts as those do
(``fontpkg-noto-sans-tamil``) is used as well.
"""

import unicodedata
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

LINE = 14  # pixels from one line of a caption to the next
SIZE = 12  # of a caption's font
INK = (25, 25, 30)
CJK = "noto_cjk_sans_jp_regular"
FONT_PACKAGES = "fontpkg.family"  # what their entry points are filed under
WITHOUT_A_FONT = "captions have characters that no font here has: pip install -e '.[fonts]' brings more scripts"


def draw_caption(canvas: Image.Image, caption: str, top: tuple[int, int], *, width: int, lines: int) -> None:
    """Write a caption into ``canvas``, centred below the point ``top``, wrapped, and cut after so many lines."""
    drawing, letters = ImageDraw.Draw(canvas), _font(_font_for(caption), SIZE)
    for number, line in enumerate(wrap(caption, letters.getlength, width, lines)):
        drawing.text((top[0], top[1] + number * LINE), line, fill=INK, font=letters, anchor="ma")


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all that is not a caption: matplotlib's."""
    return _font(_matplotlib_font(bold), size)


def wrap(text: str, length: Callable[[str], float], width: float, lines: int) -> list[str]:
    """The text in at most ``lines`` lines, none of which is longer than ``width``; "…" ends one that is cut.

    Lines end between words. A word that is longer than a line, as all are in scripts without spaces, goes on in the
    next line; an accent stays with its letter.
    """
    wrapped = [""]
    for word in text.split():
        if length(line := f"{wrapped[-1]} {word}".strip()) <= width:
            wrapped[-1] = line
            continue
        wrapped += [""] if wrapped[-1] else []
        while length(word) > width and (end := _most_that_fits(word, length, width)) < len(word):
            wrapped[-1:] = [word[:end], ""]
            word = word[end:]
        wrapped[-1] = word
    if len(wrapped) > lines:
        last = wrapped[lines - 1]
        wrapped[lines - 1 :] = [last[: _most_that_fits(last, lambda start: length(f"{start}…"), width)].rstrip() + "…"]
    return wrapped


def _most_that_fits(word: str, length: Callable[[str], float], width: float) -> int:
    """How many of a word's characters a line holds: at least one."""
    ends = [
        at for at in range(1, len(word) + 1) if at == len(word) or not unicodedata.category(word[at]).startswith("M")
    ]
    return max((end for end in ends if length(word[:end]) <= width), default=ends[0])


def _font_for(text: str) -> Path:
    """The first font that has all characters of a text, or else the most."""
    needed = {ord(own) for own in text if not own.isspace() and unicodedata.category(own) != "Cf"}
    fonts = [_matplotlib_font(), *_installed_fonts()]
    for path in fonts:
        if needed <= _characters(path):
            return path
    warnings.warn(WITHOUT_A_FONT, stacklevel=4)  # told once, since its text is the same
    return min(fonts, key=lambda path: len(needed - _characters(path)))


@lru_cache
def _characters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())


@lru_cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


@lru_cache
def _matplotlib_font(bold: bool = False) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")


@lru_cache
def _installed_fonts() -> tuple[Path, ...]:
    """One file of each package of fonts, in an order that is the same everywhere."""
    modules = [CJK, *sorted({entry.module for entry in entry_points(group=FONT_PACKAGES)})]
    files = (
        min(_files(module), key=lambda path: ("Italic" in path.name, path.name), default=None) for module in modules
    )
    return tuple(path for path in files if path)


def _files(module: str) -> Iterable[Path]:
    spec = find_spec(module)
    roots = (spec and spec.submodule_search_locations) or []
    return (path for root in roots for path in sorted(Path(root).rglob("*")) if path.suffix in (".otf", ".ttf"))
