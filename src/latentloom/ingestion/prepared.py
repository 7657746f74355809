"""Images that an earlier run has prepared: what has not changed is neither read nor decoded again.

What becomes of an image file follows from its bytes and from the *recipe*: the params that decide pixels, and the code
and libraries that decode. A hash of both is its *key*. Captions, names, order and splits are not part of it: they are
taken from the source anew in each run.

The store lies in ``.state/images``. It holds the shards of ``data/images`` of earlier runs, by hard link, so that they
take no room of their own while they are outs; and beside each shard a table with a row for every sample that was read
while the shard was written: its key, what a run needs to know of it, and where its picture is. Rejected files are rows
without a picture; a copy of a picture in another shard is found by its id. Where all rows of a shard are those of a
stored one, captions, names and splits too, that one becomes the out: its pictures are not even read.

    HASH.parquet          a shard of prepared images, as ``shards`` writes them
    HASH.parquet.keys     the table, in Parquet
    HASH.parquet.before   where rows of the shard were amended at the end of an ingestion, their metadata before that

It only saves work: it may be deleted at any time, also while a stage runs. A shard whose rows are all in those of the
last run is deleted; beyond that, the least recently used ones go where they exceed a limit. Pages have checksums: what
is damaged is deleted, and decoded again.
"""

import hashlib
import os
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, cached_property, lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import features

from latentloom import sharding, sizes, source_code
from latentloom.files import atomic_path, link_file
from latentloom.ingestion import (
    colours,
    image_formats,
    images,
    near_duplicates,
    png_chunks,
    pngs,
    preprocess,
    shard_writer,
    shards,
)
from latentloom.ingestion.preprocess import Known
from latentloom.ingestion.shard_writer import ImageRow
from latentloom.ingestion.sources import Origin
from latentloom.params import IngestParams

SHARD, KEYS, BEFORE = ".parquet", ".keys", ".before"
KEY_BYTES = 32
PER_SHARD = 2**32  # a row's place is its number, beyond its shard's number times this
CODE = (colours, image_formats, images, near_duplicates, png_chunks, pngs, preprocess, sizes)  # that decides pixels
WRITER = (sharding, shards, shard_writer)  # the code that decides the bytes of a shard of given rows
LIBRARIES = ("pillow", "numpy", "scipy", "imagehash", "pillow-heif", "pillow-jxl-plugin")
CODECS = ("jpg", "jpg_2000", "libtiff", "zlib", "webp", "avif", "littlecms2")
OPEN = 4  # shards, and row groups, that stay in memory of those that rows are read from
ELSEWHERE = -1  # a row's picture is in another shard, or there is none
CONTENT = b"content"  # in the metadata of the files beside a shard: `_content` of it when they were written
CHUNK = 2**20
DAMAGED = (OSError, pa.ArrowException, ValueError, KeyError)

Key = bytes


SCHEMA = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),
        ("row", pa.int32()),
        ("id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("profile", pa.string()),
        ("png_bytes", pa.int32()),
        ("png_start", pa.binary()),
        ("signature", pa.binary()),
        ("file_hash", pa.binary()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("preview", pa.binary()),
        ("shown", pa.bool_()),
    ]
)
OF_KNOWN = SCHEMA.names[2:]


def recipe(params: IngestParams) -> str:
    """A hash of all that decides what becomes of an image file, beside its bytes."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    decides = (
        [[list(size) for size in table] for table in params.tables],
        (params.max_pixels, params.max_aspect_ratio, params.near_duplicate_distance is not None),
        _hash_of(CODE),
        [installed(name) for name in LIBRARIES],
        [features.version(name) for name in CODECS],
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()


class PreparedStore:
    """Finds what earlier runs prepared, and keeps what this one does.

    Args:
        folder: need not exist.
        limit: bytes of shards that this run does not use; `finish` deletes what exceeds them.
        recipe: see there.
        content_of: gives the SHA-256 of a file where it is known without reading it, else None.
    """

    def __init__(self, folder: Path, limit: int, recipe: str, content_of: Callable[[str], str | None]) -> None:
        self._folder, self._limit, self._recipe, self._content_of = folder, limit, recipe, content_of
        self._noted: list[tuple[Key, Known]] = []
        self._kept: list[tuple[str, np.ndarray]] = []  # of this run: names, and beginnings of keys
        self._shards = self._by_age()
        self._words, self._places = self._index(KEYS, "key")
        self._dropped: set[int] = set()
        self._contents: dict[tuple[int, ...], bytes] = {}  # of shards read whole by this run, by what tells a file
        # The place behind that of the last row found, since rows mostly come in their old order; no place yet.
        self._next = len(self._shards) * PER_SHARD
        self._table = lru_cache(OPEN)(self._read_table)
        self._file = lru_cache(OPEN)(self._open)
        self._group = lru_cache(OPEN)(self._read_group)

    def key(self, origin: Origin | None) -> Key | None:
        """By which a sample is known; None where that cannot be told without reading it."""
        if origin is None:
            return None
        content = "" if origin.file is None else self._content_of(origin.file)
        if content is None:
            return None
        return hashlib.sha256(f"{content}|{origin.part}|{self._recipe}".encode("utf-8", "surrogateescape")).digest()

    def knows(self, origin: Origin) -> bool:
        """Whether `find` finds what is of this origin."""
        key = self.key(origin)
        return key is not None and self.find(key) is not None

    def find(self, key: Key) -> Known | None:
        """What is known of the sample with this key, its picture apart."""
        known = self._at(self._next, key)
        if known is None:
            place = _find(self._words, self._places, key)
            known = None if place is None else self._at(place, key)
            self._next = self._next if known is None else place
        self._next += known is not None
        return known

    def picture(self, known: Known) -> memoryview | None:
        """The PNG of a known image, in the memory of its row group; None where it is gone or damaged."""
        place = known.place if known.place >= 0 else _find(*self._ids, bytes.fromhex(known.id))
        if place is None:
            return None
        shard, row = divmod(place, PER_SHARD)
        try:
            number = bisect_right(starts := self._file(shard)[1], row) - 1
            ids, ends, pngs = self._group(shard, number)
            of_group = row - starts[number]
            return pngs[ends[of_group] : ends[of_group + 1]] if ids[of_group] == known.id else None
        except DAMAGED as error:
            self._drop(shard, error)
            return None

    def link(self, rows: Sequence[ImageRow], path: Path) -> bool:
        """Put the shard of just these known rows at ``path``, if it is stored and is what would be written there."""
        number, first = divmod(rows[0].png.place, PER_SHARD)
        if number < 0 or first:
            return False
        keys, shard, before = self._files(self._shards[number])
        was_amended = before.exists()
        try:
            written = (pq.read_schema(before if was_amended else keys).metadata or {})[CONTENT]
            is_same = _rows_of(shard, before).equals(shard_writer.metadata_table(rows))
            if is_same := is_same and written == self._content(shard):
                path.parent.mkdir(parents=True, exist_ok=True)
                if was_amended:
                    link_file(before, shard_writer.before_amending(path))
                link_file(shard, path)
        except DAMAGED:  # which is told where a picture is read
            return False
        return is_same

    def note(self, key: Key, known: Known) -> None:
        """Remember a sample; `keep` writes down what was noted since the last shard."""
        self._noted.append((key, known))

    def keep(self, shard: Path) -> Callable[[], None]:
        """Take in the samples noted since the last shard; the function given takes in the shard when it is written. If
        it cannot be kept, that costs a warning alone."""
        noted, self._noted = self._noted, []
        return partial(self._write, shard, noted)

    def finish(self, written: Iterable[Path]) -> None:
        """Take in what was noted after the last shard, and delete shards that nobody needs.

        Args:
            written: the shards that were kept, in order; some may have been written anew since.
        """
        for shard, (name, _) in zip(written, self._kept, strict=False):
            _, stored, before = self._files(name)
            with suppress(*DAMAGED):
                if not os.path.samefile(shard, stored):  # noqa: PTH121
                    self._write_table(before, _rows_of(stored, before), shard)
                    link_file(shard, stored)
        if self._noted:
            self._write(None, self._noted)
        self._trim()

    def _write(self, shard: Path | None, noted: list[tuple[Key, Known]]) -> None:
        ids = _read(shard, ["id"])["id"].to_pylist() if shard else []
        rows = {own: row for row, own in enumerate(ids)}
        columns = {name: [getattr(known, name) for _, known in noted] for name in OF_KNOWN}
        keys = [key for key, _ in noted]
        columns |= {"key": keys, "row": [rows.get(known.id, ELSEWHERE) for _, known in noted]}
        name = hashlib.sha256(b"".join(keys) + "".join(ids).encode()).hexdigest() + SHARD
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            keys_path, stored, before = self._files(name)
            if shard and not (stored.exists() and os.path.samefile(shard, stored)):  # noqa: PTH121
                before.unlink(missing_ok=True)
                link_file(shard, stored)
            self._write_table(keys_path, pa.table(columns, SCHEMA), shard)
        except OSError as error:
            warnings.warn(f"{self._folder}: {error}; a later run will read these images again", stacklevel=3)
        self._kept.append((name, _words(keys)))

    def _write_table(self, path: Path, table: pa.Table, shard: Path | None) -> None:
        """Write a file that lies beside a shard, and tells its content."""
        table = table.replace_schema_metadata({CONTENT: self._content(shard)} if shard else {})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def _content(self, shard: Path) -> bytes:
        """`_content`; a shard that was linked is kept right after it, by another name."""
        status = shard.stat()
        file = status.st_ino, status.st_size, status.st_mtime_ns
        if file not in self._contents:
            self._contents[file] = _content(shard)
        return self._contents[file]

    def _trim(self) -> None:
        """Delete the shards whose samples are all in those of this run; then the least recently used ones."""
        kept = {name for name, _ in self._kept}
        now = np.concatenate([np.empty(0, np.uint64), *(words for _, words in self._kept)])
        needed = {self._shards[shard] for shard in np.unique(self._places[~np.isin(self._words, now)] // PER_SHARD)}
        for name in set(self._shards) - needed - kept:
            self._delete(name)
        room = self._limit
        for name in self._by_age():
            if name not in kept:
                room -= sum(path.stat().st_size for path in self._files(name) if path.exists())
                if room < 0:
                    self._delete(name)

    def _files(self, name: str) -> list[Path]:
        return [self._folder / (name + KEYS), self._folder / name, self._folder / (name + BEFORE)]

    def _delete(self, name: str) -> None:
        for path in self._files(name):  # first the one which says that the other is there
            path.unlink(missing_ok=True)

    def _drop(self, shard: int, error: Exception) -> None:
        name = self._shards[shard]
        if not isinstance(error, FileNotFoundError):
            warnings.warn(f"{self._folder / name} is damaged ({error}): its images are read again", stacklevel=3)
        self._delete(name)
        self._dropped.add(shard)

    def _by_age(self) -> list[str]:
        """The names of all shards, the newest first."""
        ages = []
        for path in self._folder.glob(f"*{KEYS}"):
            with suppress(FileNotFoundError):  # another run trimmed it
                ages.append((path.stat().st_mtime_ns, path.name.removesuffix(KEYS)))
        return [name for _, name in sorted(ages, reverse=True)]

    def _index(self, suffix: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        """The beginnings of all keys, or of the ids of all pictures, sorted; and their places."""
        words, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for shard, name in enumerate(self._shards):
            with suppress(*DAMAGED):  # which is told where a row is read
                values = _read(self._folder / (name + suffix), [column])[column].to_pylist()
                words.append(_words(values if column == "key" else map(bytes.fromhex, values)))
                places.append(shard * PER_SHARD + np.arange(len(values)))
        all_words = np.concatenate(words)
        order = np.argsort(all_words, kind="stable")  # of equal ones, the newest is found
        return all_words[order], np.concatenate(places)[order]

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        return self._index("", "id")

    def _at(self, place: int, key: Key) -> Known | None:
        shard, row = divmod(place, PER_SHARD)
        if shard >= len(self._shards) or shard in self._dropped:
            return None
        try:
            keys, known = self._table(shard)
        except DAMAGED as error:
            self._drop(shard, error)
            return None
        return known[row] if row < len(keys) and keys[row] == key else None

    def _read_table(self, shard: int) -> tuple[list[Key], list[Known]]:
        path = self._folder / (self._shards[shard] + KEYS)
        os.utime(path)  # it is used now
        columns = _read(path, SCHEMA.names).to_pydict()
        rows = [ELSEWHERE if row < 0 else shard * PER_SHARD + row for row in columns["row"]]
        values = (columns[name] for name in OF_KNOWN)
        return columns["key"], [Known(*own) for own in zip(*values, rows, strict=True)]

    def _open(self, shard: int) -> tuple[pq.ParquetFile, list[int]]:
        """A shard, and the first row of each of its row groups."""
        file = pq.ParquetFile(self._folder / self._shards[shard], page_checksum_verification=True)
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        return file, [0, *accumulate(groups[:-1])]

    def _read_group(self, shard: int, number: int) -> tuple[list[str], list[int], memoryview]:
        """The ids of a row group, where each PNG ends, from 0 on, and the PNGs one after another."""
        table = self._file(shard)[0].read_row_group(number, columns=["id", "image.bytes"], use_threads=False)
        (images,) = table["image"].chunks
        _, ends, pngs = images.field("bytes").buffers()
        return table["id"].to_pylist(), np.frombuffer(ends, np.int32).tolist(), memoryview(pngs)


def _words(keys: Iterable[Key]) -> np.ndarray:
    """The first 8 bytes of each key, as numbers: uint64 ``(N,)``."""
    return np.frombuffer(b"".join(key[:8] for key in keys), ">u8").astype(np.uint64)


def _read(path: Path, columns: list[str]) -> pa.Table:
    """Columns of a Parquet file, whose pages are whole."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns).select(columns)


def _rows_of(shard: Path, before: Path) -> pa.Table:
    """The metadata of a shard's rows, as it was before they were amended."""
    return _read(before if before.exists() else shard, shards.METADATA_COLUMNS)


def _content(shard: Path) -> bytes:
    """Tells whether a shard has the bytes that it was written with, and would be written with now."""
    checksum = 0
    with open(shard, "rb") as file:
        while part := file.read(CHUNK):
            checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x} pyarrow {pa.__version__} {_hash_of(WRITER)}".encode()


@cache
def _hash_of(modules: tuple[ModuleType, ...]) -> str:
    """One hash of the modules' code."""
    return source_code.code_hash([Path(module.__file__) for module in modules], Path(sizes.__file__).parent)


def _find(words: np.ndarray, places: np.ndarray, key: Key) -> int | None:
    word = np.uint64(int.from_bytes(key[:8], "big"))
    found = int(np.searchsorted(words, word))
    return int(places[found]) if found < len(words) and words[found] == word else None
