"""Sizes of pictures, and the table of sizes, called buckets, that pictures of any shape are cropped to.

All buckets of a table have about the area of one square, its *base size*, so that they cost the network about as much.
Pixels throughout, width first, as people write it: 192x128.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


class Size(NamedTuple):
    """Width and height; ``str`` gives ``192x128``."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def ratio(self) -> float:
        """Width by height."""
        return self.width / self.height

    @classmethod
    def parse(cls, text: str) -> "Size":
        """The size that ``192x128`` names; raises ValueError where it names none."""
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", text):
            raise ValueError(f"{text!r} is no size: it is written as WIDTHxHEIGHT in pixels, such as 192x128")
        return cls(*map(int, text.split("x")))


@cache
def bucket_table(image_size: int, multiple: int, max_ratio: float) -> tuple[Size, ...]:
    """The buckets of a base size, the widest last: sides are multiples of ``multiple``, the longer side is at most
    ``max_ratio`` times the shorter.

    For each width the height is the multiple that brings the area nearest to ``image_size`` squared, the lower one of
    two; each size is there lying and standing. The square of ``image_size`` is one of them.
    """
    table = {Size(image_size, image_size)}
    for width in range(multiple, math.ceil(image_size * max_ratio) + multiple, multiple):
        height = multiple * math.ceil(image_size**2 / (width * multiple) - 0.5)
        if height and max(width, height) <= max_ratio * min(width, height):
            table |= {Size(width, height), Size(height, width)}
    return tuple(sorted(table, key=lambda size: (size.ratio, size)))


def kept_share(width: int, height: int, size: Size) -> float:
    """The share of a picture's area that a crop to the ratio of ``size`` keeps."""
    ratio = (width * size.height) / (height * size.width)
    return min(ratio, 1 / ratio)


def enlargement(width: int, height: int, size: Size) -> float:
    """How many times as large a picture becomes that is cropped and scaled to ``size``; below 1 it is made smaller."""
    return max(size.width / width, size.height / height)


def best_bucket(width: int, height: int, table: Sequence[Size]) -> Size:
    """The bucket that keeps most of a picture; of equally good ones the larger, then the first."""
    return max(table, key=lambda size: (kept_share(width, height, size), size.width * size.height))


def prepared_size(width: int, height: int, tables: Sequence[Sequence[Size]]) -> Size:
    """The size at which a picture is prepared: the best bucket of the largest base size that it fills without being
    enlarged; of the smallest where it fills none.

    Args:
        tables: of each base size, ascending.
    """
    best = [best_bucket(width, height, table) for table in tables]
    filled = [size for size in best if enlargement(width, height, size) <= 1]
    return filled[-1] if filled else best[0]
