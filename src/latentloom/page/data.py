"""The data a page at a time: what was kept, what was rejected and why, and which images look alike.

Files are read a batch of rows at a time, and no further than the page that is asked for; pictures of its rows alone.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentloom.errors import UserError
from latentloom.ingestion.pngs import decode
from latentloom.ingestion.shards import read_manifest

ROWS = 24  # of a page

Shown = TypeVar("Shown")
Place = tuple[Path, int, int]  # of an image: the shard, the row group, the row in it


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
    return _rows(_page(_with(images, words), page))


def rejected(rejects: Path, words: str, page: int) -> list[dict[str, Any]]:
    """The rows of a page, from 1, of what was rejected, with ``words`` in key, reason or detail."""

    def fits(row: dict[str, Any]) -> bool:
        return words.strip().casefold() in f"{row['key']} {row['reason']} {row['detail']}".casefold()

    rows = (row for _, _, table in _groups(rejects) for row in table.to_pylist())
    return _page(filter(fits, rows), page)


def alike(near_duplicates: Path, images: Path, words: str, page: int) -> list[tuple[Row, Row, int]]:
    """The pairs of a page, from 1, of images that look alike, one with ``words`` in a caption; and their distance."""
    pairs = (pair.values() for _, _, table in _groups(near_duplicates) for pair in table.to_pylist())
    if words.strip():
        wanted = {row.id for row in _rows(_with(images, words))}
        pairs = ((a, b, distance) for a, b, distance in pairs if a in wanted or b in wanted)
    shown = _page(pairs, page)
    rows = {row.id: row for row in rows_of(images, {own for a, b, _ in shown for own in (a, b)})}
    return [(rows[a], rows[b], distance) for a, b, distance in shown if a in rows and b in rows]


def rows_of(images: Path, ids: Collection[str]) -> list[Row]:
    """The images with these ids, in the shards' order."""
    wanted = pa.array(sorted(ids), pa.string())
    return _rows(_places(images, "id", lambda table: np.flatnonzero(pc.is_in(table["id"], wanted))))


def _with(images: Path, words: str) -> Iterator[Place]:
    """Images with ``words`` in a caption, whatever the case of their letters."""

    def matching(table: pa.Table) -> np.ndarray:
        captions = table["captions"].combine_chunks()
        hits = pc.match_substring(captions.flatten(), words.strip(), ignore_case=True)
        return pc.list_parent_indices(captions).filter(hits).unique().to_numpy()

    return _places(images, "captions", matching)


def _places(images: Path, column: str, rows: Callable[[pa.Table], Iterable[int]]) -> Iterator[Place]:
    for shard in read_manifest(images)["shards"]:
        for path, group, table in _groups(images / shard["name"], [column]):
            yield from ((path, group, int(row)) for row in rows(table))


def _rows(places: Iterable[Place]) -> list[Row]:
    rows = []
    for (path, group), own in groupby(places, lambda place: place[:2]):
        with pq.ParquetFile(path) as file:
            table = file.read_row_group(group, ["id", "captions", "split", "key", "image.bytes"])
        for _, _, place in own:
            row = {name: table[name][place].as_py() for name in table.column_names}
            rows.append(Row(png=row.pop("image")["bytes"], **row))
    return rows


def _page(rows: Iterable[Shown], page: int) -> list[Shown]:
    if not isinstance(page, int) or page < 1:
        raise UserError(f"page = {page}: must be a whole number from 1")
    return list(islice(rows, (page - 1) * ROWS, page * ROWS))


def _groups(path: Path, columns: list[str] | None = None) -> Iterator[tuple[Path, int, pa.Table]]:
    """A file's row groups."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield path, group, file.read_row_group(group, columns)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: `make repro` makes it") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be used ({error}): delete it and run `dvc repro`") from error
