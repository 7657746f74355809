"""How many images are of each size, and how much of them is cut off on average, beside what the square would cut."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from latentloom.ingestion.shard_writer import ImageRow
from latentloom.sizes import Size, kept_share

SQUARE = Size(1, 1)
ALL = "all"


class SizeTable:
    """Counts images of each size, and adds up the shares of their originals that crops take away."""

    def __init__(self) -> None:
        self._sums: dict[Size, tuple[int, float, float]] = {}  # images, cut off, cut off by the square

    def add(self, row: ImageRow) -> None:
        """Count an image."""
        size = row.prepared_size
        cut, by_square = (1 - kept_share(row.width, row.height, crop) for crop in (size, SQUARE))
        images, sum_cut, sum_by_square = self._sums.get(size, (0, 0.0, 0.0))
        self._sums[size] = images + 1, sum_cut + cut, sum_by_square + by_square

    def counts(self, tables: Iterable[Iterable[Size]]) -> dict[Size, int]:
        """The images of each size that has any, in the order of ``tables``."""
        return {size: int(self._sums[size][0]) for table in tables for size in table if size in self._sums}

    def rows(self, tables: Iterable[Iterable[Size]]) -> list[dict[str, Any]]:
        """For each size that has any, and for all together: ``size``, ``images``, and the shares of an original that
        are cut off on average: ``cut_off``, and ``cut_off_by_square``, had it been cropped to a square."""
        sums = {str(size): self._sums[size] for size in self.counts(tables)}
        return [
            {
                "size": size,
                "images": int(count),
                "cut_off": round(cut / count, 4),
                "cut_off_by_square": round(square / count, 4),
            }
            for size, (count, cut, square) in (sums | {ALL: np.sum(list(sums.values()), axis=0)}).items()
        ]


def render(rows: Sequence[dict[str, Any]]) -> str:
    """What `SizeTable.rows` gave, as lines to print."""
    lines = [f"{'size':>9}  {'images':>9}  {'cut off':>8}  by the square"]
    for row in rows:
        shares = f"{row['cut_off']:8.1%}  {row['cut_off_by_square']:13.1%}"
        lines.append(f"{row['size']:>9}  {row['images']:9,}  {shares}")
    return "\n".join(lines)
