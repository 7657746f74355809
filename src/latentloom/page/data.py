"""The data a page at a time: what was kept, what was rejected and why, and which images look alike.

Files are read in parts, and no further than the page that is asked for; pictures of its rows alone.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentloom.errors import UserError
from latentloom.files import iterate_table
from latentloom.ingestion.pngs import decode
from latentloom.ingestion.rejects import SCHEMA as REJECTS
from latentloom.ingestion.shards import NumberedImages, metadata_batches

ROWS = 24  # of a page
SHOWN = ["id", "captions", "split", "key"]  # of an image

Shown = TypeVar("Shown")
Found = tuple[int, pa.RecordBatch, int]  # an image's number, in the shards' order, and its row of a batch of `SHOWN`


@dataclass(frozen=True)
class Row:
    """One image of the data."""

    id: str
    captions: list[str]
    split: str
    key: str
    png: bytes

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return decode(self.png)


def kept(images: Path, words: str, page: int) -> list[Row]:
    """The images of a page, from 1, of those that have ``words`` in a caption; all where there are none."""
    return _rows(images, _page(_with(images, words), page))


def rejected(rejects: Path, words: str, page: int) -> list[dict[str, Any]]:
    """The rows of a page, from 1, of what was rejected, with ``words`` in key, reason or detail."""

    def fits(row: dict[str, Any]) -> bool:
        return words.strip().casefold() in f"{row['key']} {row['reason']} {row['detail']}".casefold()

    return _page(filter(fits, _table_rows(rejects, REJECTS.names)), page)


def alike(near_duplicates: Path, images: Path, words: str, page: int) -> list[tuple[Row, Row, int]]:
    """The pairs of a page, from 1, of images that look alike, one with ``words`` in a caption; and their distance."""
    pairs = (pair.values() for pair in _table_rows(near_duplicates, ["image_id", "twin_id", "distance"]))
    if words.strip():
        wanted = {batch["id"][row].as_py() for _, batch, row in _with(images, words)}
        pairs = ((a, b, distance) for a, b, distance in pairs if a in wanted or b in wanted)
    shown = _page(pairs, page)
    rows = {row.id: row for row in rows_of(images, {own for a, b, _ in shown for own in (a, b)})}
    return [(rows[a], rows[b], distance) for a, b, distance in shown if a in rows and b in rows]


def rows_of(images: Path, ids: Collection[str]) -> list[Row]:
    """The images with these ids, in the shards' order."""
    wanted = pa.array(sorted(ids), pa.string())
    return _rows(images, _find(images, lambda batch: np.flatnonzero(pc.is_in(batch["id"], wanted))))


def _with(images: Path, words: str) -> Iterator[Found]:
    """Images with ``words`` in a caption, whatever the case of their letters."""

    def matching(batch: pa.RecordBatch) -> np.ndarray:
        captions = batch["captions"]
        hits = pc.match_substring(captions.flatten(), words.strip(), ignore_case=True)
        return pc.list_parent_indices(captions).filter(hits).unique().to_numpy()

    return _find(images, matching)


def _find(images: Path, matching: Callable[[pa.RecordBatch], np.ndarray]) -> Iterator[Found]:
    """The images whose rows of a batch of metadata are ``matching``."""
    start = 0
    for batch in metadata_batches(images, SHOWN):
        yield from ((start + row, batch, row) for row in matching(batch).tolist())
        start += len(batch)


def _rows(images: Path, found: Iterable[Found]) -> list[Row]:
    """Images with their pictures."""
    found = list(found)
    pngs = NumberedImages(images).pngs(np.array([number for number, _, _ in found], np.int64))
    metadata = (batch.slice(row, 1).to_pylist()[0] for _, batch, row in found)
    return [Row(**own, png=png) for own, png in zip(metadata, pngs, strict=True)]


def _page(rows: Iterable[Shown], page: int) -> list[Shown]:
    if not isinstance(page, int) or page < 1:
        raise UserError(f"page = {page}: must be a whole number from 1")
    return list(islice(rows, (page - 1) * ROWS, page * ROWS))


def _table_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} does not exist: `make repro` makes it")
    for table in iterate_table(path, columns):
        yield from table.to_pylist()
