"""Writes ``data/images``, as `latentloom.ingestion.shards` has it: shards in the rows' order, then what turned out
otherwise at the end, then the manifest.

The same rows give the same bytes. ``manifest.json`` is removed before the first shard is written and comes back last: a
folder without it is not finished.
"""

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentloom import sharding
from latentloom.files import atomic_path, write_json
from latentloom.ingestion.growing import Texts
from latentloom.ingestion.pngs import size_of
from latentloom.ingestion.shards import FORMAT_VERSION, MANIFEST, METADATA_COLUMNS, ROW_GROUP_ROWS, SCHEMA
from latentloom.sizes import Size

SHARDS = "[0-9]*.parquet"
CALLS_BEHIND = 2  # row groups that wait to be written, or the end of a shard
CAPTIONS, SPLIT = map(SCHEMA.get_field_index, ("captions", "split"))
WRITER_OPTIONS = {
    "compression": {"image.bytes": "NONE"}  # PNGs are compressed already
    | dict.fromkeys(["id", "image.path", "captions.list.element", "split", "source", "key", "width", "height"], "ZSTD"),
    "use_dictionary": ["split", "source"],
    "write_statistics": ["split", "width", "height"],
    "write_page_checksum": True,
}


@dataclass(frozen=True)
class StoredPng:
    """A PNG that an earlier run has stored at a ``place``: its ``size`` in bytes, its header, and what gives it."""

    place: int
    size: int
    start: bytes
    read: Callable[[], bytes | memoryview]

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return bytes(self.read())


@dataclass(frozen=True)
class ImageRow:
    """One prepared image as ``png``; ``width`` and ``height`` are those of the original.

    ``profile``, of colours, ``signature`` and ``file_hash``, the SHA-256 of the file, are not written; the signature is
    empty where near duplicates are not looked for.
    """

    id: str
    png: bytes | StoredPng
    captions: list[str]
    split: str
    source: str
    key: str
    width: int
    height: int
    profile: str = "none"
    signature: bytes = b""
    file_hash: bytes = b""

    @property
    def prepared_size(self) -> Size:
        """That of the PNG."""
        return size_of(self.png.start if isinstance(self.png, StoredPng) else self.png)


@dataclass
class SourceCount:
    """What came of one source; ``found`` is ``kept`` and ``rejected`` together."""

    name: str
    source: str
    weight: float
    attribution: str | None
    licence: str | None
    found: int = 0
    kept: int = 0
    rejected: int = 0


def write_shards(
    rows: Iterable[ImageRow],
    folder: Path,
    finished: Callable[[Path], Callable[[], None]] = lambda _: lambda: None,
    link: Callable[[Sequence[ImageRow], Path], bool] = lambda *_: False,
) -> list[dict[str, Any]]:
    """Write ``rows`` as shards into ``folder``, which is unfinished from the first one on; give their names and rows.

    Args:
        finished: is called with each shard before the next row is asked for; what it gives, when the shard is written,
            in a thread.
        link: called with the rows of a shard where all have a `StoredPng`; puts an earlier run's shard of just these
            rows there, with `before_amending` where it was amended, and says whether there was one.
    """
    rows, shards = iter(rows), []
    first = next(rows, None)  # what goes wrong before there is a row leaves the folder as it was
    (folder / MANIFEST).unlink(missing_ok=True)
    with _Behind() as behind:
        while first is not None:
            path = folder / f"{len(shards):05d}.parquet"
            count = _write_shard(path, itertools.chain([first], rows), link, behind)
            shards.append({"name": path.name, "rows": count})
            behind(finished(path))
            first = next(rows, None)
        behind.wait()
    return shards


class JoinedCaptions:
    """The captions of files equal to that of a row, in the order in which they came: what the row has gained by them.

    ``add`` takes the row's place, counted over all shards.
    """

    def __init__(self) -> None:
        self._places, self._ends = array("I"), array("Q", [0])  # of each file: its row, and where its captions end
        self._texts = Texts()

    def add(self, place: int, captions: Sequence[str]) -> None:
        for caption in captions:
            self._texts.append(caption)
        self._places.append(place)
        self._ends.append(len(self._texts))

    def by_rows(self) -> Callable[[range], list[list[str]]]:
        """Of a range of rows, the captions that each has gained; an empty list where none has any."""
        files = np.argsort(self._places, kind="stable")
        places = np.frombuffer(self._places, np.uint32)[files]

        def gained(rows: range) -> list[list[str]]:
            start, stop = np.searchsorted(places, [rows.start, rows.stop])
            captions: list[list[str]] = [[] for _ in rows] if start < stop else []
            for file in files[start:stop].tolist():
                own = captions[self._places[file] - rows.start]
                more = map(self._texts.__getitem__, range(self._ends[file], self._ends[file + 1]))
                own += [caption for caption in more if caption not in own]
            return captions

        return gained


def amend_shards(folder: Path, shards: list[dict[str, Any]], to_train: np.ndarray, joined: JoinedCaptions) -> int:
    """Write anew the shards whose rows turned out otherwise, as if they had been so from the start; not those that an
    earlier run has amended in the same way.

    Args:
        folder: the unfinished folder.
        shards: what ``write_shards`` gave.
        to_train: places, counted over all shards, of rows that belong into the training split.
        joined: captions that rows have behind their own, without those that they have already.

    Returns:
        how many captions have come to those that were there.
    """
    start = added = 0
    to_train, gained = np.sort(to_train), joined.by_rows()
    for shard in shards:
        path, places = folder / shard["name"], range(start, start + shard["rows"])
        start += shard["rows"]
        first, last = np.searchsorted(to_train, [places.start, places.stop])
        more = gained(places)
        if first < last or more or before_amending(path).exists():
            added += _amend_shard(path, np.isin(places, to_train[first:last]), more)
    return added


def before_amending(shard: Path) -> Path:
    """In an unfinished folder, beside an earlier run's shard: its rows' metadata before they were amended."""
    return shard.with_name(f".{shard.name}.before.tmp")


def write_manifest(
    folder: Path,
    image_size: int | list[int],
    train: int,
    sources: Collection[SourceCount],
    shards: list[dict[str, Any]],
    sizes: Mapping[Size, int] | None = None,
) -> dict[str, Any]:
    """Finish the folder: what earlier runs left goes, then the manifest comes, which is returned.

    Args:
        folder: what ``write_shards`` left.
        image_size: pixels per side of the square, or of the base sizes.
        train: how many of the images are in the training split.
        sources: what came of each; thanks go to those that gave images.
        shards: what ``write_shards`` gave.
        sizes: of how many images; None where all are squares of ``image_size``.
    """
    images = sum(shard["rows"] for shard in shards)
    manifest = {
        "format_version": FORMAT_VERSION,
        "image_size": image_size,
        **({} if sizes is None else {"sizes": [[*size, count] for size, count in sizes.items()]}),
        "found": sum(source.found for source in sources),
        "rejected": sum(source.rejected for source in sources),
        "images": images,
        "train": train,
        "validation": images - train,
        "sources": [asdict(source) for source in sources],
        "attribution": _joined(source.attribution for source in sources if source.kept),
        "licence": _joined(source.licence for source in sources if source.kept),
        "shards": shards,
    }
    names = {shard["name"] for shard in shards}
    for path in [*folder.glob(SHARDS), *folder.glob(".*.tmp")]:
        if path.name not in names:
            path.unlink()
    write_json(folder / MANIFEST, manifest)
    return manifest


def _joined(texts: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, texts))) or None


class _Behind:
    """Makes calls in a thread, one after another, while the caller goes on, by a few, so that little is in memory.

    What a call raises is raised by one of the next, or by `wait`.
    """

    def __init__(self) -> None:
        self._thread, self._calls = ThreadPoolExecutor(1), deque[Future[Any]]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.wait(CALLS_BEHIND)
        self._calls.append(self._thread.submit(function, *arguments))

    def rest(self) -> None:
        """Wait until no call is left, whatever they raised."""
        futures.wait(self._calls)

    def wait(self, left: int = 0) -> None:
        """Wait until at most so many calls are left."""
        while len(self._calls) > left:
            self._calls.popleft().result()


def _write_shard(
    path: Path, rows: Iterator[ImageRow], link: Callable[[Sequence[ImageRow], Path], bool], behind: _Behind
) -> int:
    """Write or link one shard, of as many ``rows`` as belong into it, the end of it ``behind``; give their number."""
    before_amending(path).unlink(missing_ok=True)  # of a run that was killed
    of_shard, count = _up_to_its_end(rows), 0
    begin: list[ImageRow] = []
    for row in of_shard:
        begin.append(row)
        if not isinstance(row.png, StoredPng):
            of_shard = itertools.chain(begin, of_shard)
            break
    else:
        if link(begin, path):
            return len(begin)
        of_shard = iter(begin)
    room = sharding.IMAGES.fewest + sharding.IMAGES.typical
    with ExitStack() as opened:
        temporary = opened.enter_context(atomic_path(path, room))
        writer = opened.enter_context(pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS))
        try:
            while group := list(itertools.islice(of_shard, ROW_GROUP_ROWS)):
                behind(writer.write_table, _table(group))
                count += len(group)
        finally:
            behind.rest()  # nothing is written to a file that an error closes
        behind.wait()
        finish = opened.pop_all().close
    behind(finish)
    return count


def _up_to_its_end(rows: Iterator[ImageRow]) -> Iterator[ImageRow]:
    shard_bytes = 0
    for row in rows:
        yield row
        shard_bytes += len(row.png)
        if sharding.ends_shard(row.id, len(row.png), shard_bytes, sharding.IMAGES):
            return


def _table(group: list[ImageRow]) -> pa.Table:
    pngs = [row.png.read() if isinstance(row.png, StoredPng) else row.png for row in group]
    ends = np.cumsum([0, *map(len, pngs)]).astype(np.int32)
    content = pa.Array.from_buffers(  # which would be copied over and over where it grows by a picture at a time
        pa.binary(), len(pngs), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(pngs))]
    )
    image = [content, pa.array([f"{row.id}.png" for row in group])]
    metadata = metadata_table(group)
    columns = dict(zip(metadata.column_names, metadata.columns, strict=True))
    return pa.table(columns | {"image": pa.StructArray.from_arrays(image, ["bytes", "path"])}, SCHEMA)


def metadata_table(rows: Sequence[ImageRow]) -> pa.Table:
    """`METADATA_COLUMNS` of rows."""
    schema = pa.schema([SCHEMA.field(name) for name in METADATA_COLUMNS])
    return pa.table({name: [getattr(row, name) for row in rows] for name in METADATA_COLUMNS}, schema)


def _amend_shard(path: Path, is_moved: np.ndarray, more_captions: list[list[str]]) -> int:
    """Give how many captions were added; ``more_captions`` is empty or has an entry for each row."""
    before, added = before_amending(path), 0
    with pq.ParquetFile(path) as file:
        there = file.read(["captions", "split"])
        rows = pq.read_table(before, columns=there.column_names) if before.exists() else there
        captions = rows["captions"]
        if more_captions:
            own = captions.to_pylist()
            fresh = [[text for text in new if text not in old] for old, new in zip(own, more_captions, strict=True)]
            captions = [old + new for old, new in zip(own, fresh, strict=True)]
            added = sum(len(set(new)) for new in fresh)
        split = pc.if_else(pa.array(is_moved), "train", rows["split"])
        amended = pa.table({"captions": captions, "split": split}).cast(there.schema)
        if amended.equals(there):
            return added
        with (
            atomic_path(path, room=path.stat().st_size) as temporary,
            pq.ParquetWriter(temporary, SCHEMA, **WRITER_OPTIONS) as writer,
        ):
            start = 0
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                part = amended.slice(start, len(group))
                start += len(group)
                for column in (CAPTIONS, SPLIT):
                    field = SCHEMA.field(column)
                    group = group.set_column(column, field, part[field.name])
                writer.write_table(group.combine_chunks().cast(SCHEMA))
    return added
