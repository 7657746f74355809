"""Which captions each image has, as the text cache tells: rows of it, by number; their texts stay on the disk.

data/text/pairs.parquet   image, caption, position  -> `Captions`: of every image its captions' rows
data/text/index.parquet   the texts                 -> `CaptionTexts`
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from latentloom import ids
from latentloom.encoding.row_sources import Rows
from latentloom.errors import UserError
from latentloom.files import iterate_table


@dataclass(frozen=True)
class Captions:
    """Which captions each of N images has: ``numbers[firsts[i] : firsts[i] + counts[i]]``, the primary one first.

    On the CPU. Selections share their numbers.

    Attributes:
        numbers: rows of the text cache (P), int32.
        firsts: (N), int64.
        counts: captions per image (N), int32.
    """

    numbers: torch.Tensor
    firsts: torch.Tensor
    counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, rows: Rows) -> "Captions":
        """Those of some of the images."""
        rows = rows if isinstance(rows, slice) else rows.cpu()
        return replace(self, firsts=self.firsts[rows], counts=self.counts[rows])

    @property
    def primary(self) -> torch.Tensor:
        """The primary caption of each image (N), int64."""
        return self.numbers[self.firsts].long()

    def pick(self, uniform: torch.Tensor) -> torch.Tensor:
        """One caption of each image (N), int64, by numbers from [0, 1): all of them alike."""
        return self.numbers[self.firsts + (uniform * self.counts).long()].long()

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All captions of all images, one image after the other: whose each is, and which it is, both int64."""
        owners = torch.arange(len(self)).repeat_interleave(self.counts)
        within = torch.arange(len(owners)) - (self.counts.cumsum(0) - self.counts)[owners]
        return owners, self.numbers[self.firsts[owners] + within].long()

    @classmethod
    def concatenate(cls, parts: Sequence["Captions"]) -> "Captions":
        """Those of one part after the other."""
        numbers = {id(part.numbers): part.numbers for part in parts}  # which selections share
        shifts = dict(zip(numbers, accumulate(map(len, numbers.values()), initial=0), strict=False))
        firsts = torch.cat([part.firsts + shifts[id(part.numbers)] for part in parts])
        counts = torch.cat([part.counts for part in parts])
        own = list(numbers.values())
        return cls(torch.cat(own) if len(own) > 1 else own[0], firsts, counts)


class CaptionTexts:
    """The captions (M) of a text cache, which stay in its index until some are asked for."""

    def __init__(self, index: Path) -> None:
        self._index = index

    def at(self, rows: torch.Tensor) -> list[str]:
        """The captions of some rows of the cache, in the order asked for."""
        numbers, places = np.unique(rows.cpu().numpy(), return_inverse=True)
        texts = [text for part in self.parts(numbers) for text in part]
        return [texts[place] for place in places]

    def parts(self, numbers: np.ndarray | None = None) -> Iterator[list[str]]:
        """The captions of all rows, or of some, which are ascending; many thousands at a time."""
        first = 0
        for table in iterate_table(self._index, ["text"]):
            column, stop = table.column("text"), first + len(table)
            if numbers is not None:
                column = column.take(pa.array(numbers[slice(*np.searchsorted(numbers, [first, stop]))] - first))
            yield column.to_pylist()
            first = stop


def caption_rows(pairs: Path, caption_ids: np.ndarray) -> np.ndarray:
    """The caption of each pair, as a row of the text cache (P), int32.

    Raises:
        UserError: when one has no embedding, naming it.
    """
    found = []
    for names, rows in _places(pairs, "caption_id", caption_ids):
        if (rows < 0).any():
            name = names[int(np.argmin(rows))]
            raise UserError(f"{pairs} names a caption that has no embedding: {name}; run `dvc repro`")
        found.append(rows)
    return np.concatenate(found)


def captions_of(image_ids: np.ndarray, pairs: Path, rows: np.ndarray) -> Captions:
    """The captions of the images, of pairs in any order; ``rows`` are the pairs' `caption_rows`.

    Raises:
        UserError: when an image has none.
    """
    image_rows = np.concatenate([own for _, own in _places(pairs, "image_id", image_ids)])
    positions = np.concatenate([table.column("position").to_numpy() for table in iterate_table(pairs, ["position"])])
    known = image_rows >= 0  # others are of images whose latent was rejected
    counts = np.bincount(image_rows[known], minlength=len(image_ids)).astype(np.int32)
    if not counts.all():
        missing = image_ids[counts == 0]
        raise UserError(
            f"{len(missing)} images have no caption in the text cache, the first: {missing[0].tobytes().hex()}; run "
            "`dvc repro`"
        )
    by_image = np.lexsort((positions, image_rows))[np.count_nonzero(~known) :]
    numbers = torch.from_numpy(rows[by_image])
    ends = counts.cumsum(dtype=np.int64)
    return Captions(numbers, torch.from_numpy(ends - counts), torch.from_numpy(counts))


def _places(pairs: Path, column: str, among: np.ndarray) -> Iterator[tuple[pa.ChunkedArray, np.ndarray]]:
    """A column of ids of the pairs, in parts, and where each is ``among`` others, int32; -1: nowhere."""
    lookup = ids.Lookup(among)
    for table in iterate_table(pairs, [column]):
        own = table.column(column)
        yield own, lookup.positions(ids.from_hex(own)).astype(np.int32)
