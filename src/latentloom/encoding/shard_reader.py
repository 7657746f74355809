"""Many shards of one form, of which rows are read by their places; no file is held open, and none mapped.

A shard is opened when rows of it are read, and closed again: a training of millions of rows holds neither a file nor a
memory map, of which Linux allows a process 65,530. Their headers are read once, so what is wrong is told at the start.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError

from latentloom.encoding.shard_files import ENDS, DamagedShardError, ragged_names
from latentloom.tensor_files import StoredTensor, read_layout

READERS = 4  # threads that read shards; a disk answers several questions in the time of one
GAP = 32 * 2**10  # bytes; rows nearer to each other are read in one piece


class ShardReader:
    """Shards of one form: what their headers say of where tensors begin. No file of them is held open.

    Attributes:
        layout: the tensors of the first, by name; those of the others differ in their number of rows alone.
        ragged: the names of those whose rows have different lengths.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        with ThreadPoolExecutor(READERS) as readers:
            read = list(readers.map(_header, paths))
        self.layout = read[0][0]
        self.ragged = ragged_names(self.layout)
        names, form = list(self.layout), _form(self.layout)
        for path, (layout, _) in zip(paths, read, strict=True):
            if _form(layout) != form:
                raise _wrong(path)
        self._column = {name: column for column, name in enumerate(names)}
        self._offsets = np.array([[layout[name].offset for name in names] for layout, _ in read], np.int64)
        self._sizes = np.array([[layout[name].shape[0] for name in names] for layout, _ in read], np.int64)
        self._identities = [identity for _, identity in read]

    def check_rows(self, fewest: np.ndarray) -> None:
        """Raise `DamagedShardError` where a shard has fewer rows than its index tells of."""
        columns = [column for name, column in self._column.items() if name not in self.ragged]
        if (short := np.flatnonzero((self._sizes[:, columns] < fewest[:, None]).any(1))).size:
            raise _wrong(self._paths[short[0]])

    def bytes_of(self, name: str) -> int:
        """The bytes of a row of a tensor, or of an item of it."""
        stored = self.layout[name]
        return math.prod(stored.shape[1:]) * stored.dtype.itemsize

    def read(self, shard: int, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Read of each tensor named the rows at some places, ascending, into bytes, one after the other.

        Raises:
            DamagedShardError: when the shard was deleted or replaced since its header was read, naming it.
        """
        with self._opened(shard) as file:
            for name, (places, into) in parts.items():
                _read_places(file, self._offset(shard, name), places, into)

    def _offset(self, shard: int, name: str) -> int:
        return int(self._offsets[shard, self._column[name]])

    @contextmanager
    def _opened(self, shard: int) -> Iterator[BinaryIO]:
        path = self._paths[shard]
        with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
            if _identity(file) == self._identities[shard]:
                yield file
                return
        raise DamagedShardError(
            f"{path} was deleted or replaced while it was in use; run `dvc repro` again: a training resumes from its "
            "last checkpoint if its data are still the same"
        )

    def ends(self, name: str) -> list[np.ndarray]:
        """Where the items of each row of a ragged tensor end, for each shard."""
        found = []
        for shard in range(len(self._paths)):
            own = np.empty(self._sizes[shard, self._column[name + ENDS]], np.int64)
            with self._opened(shard) as file:
                _fill(file, self._offset(shard, name + ENDS), own.view(np.uint8))
            found.append(own)
        return found


def _header(path: Path) -> tuple[dict[str, StoredTensor], tuple[int, ...]]:
    try:
        with open(path, "rb", buffering=0) as file:
            return read_layout(file), _identity(file)
    except (SafetensorError, OSError) as error:
        raise DamagedShardError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """What changes when a file is replaced by another, or written to."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _wrong(path: Path) -> DamagedShardError:
    return DamagedShardError(f"{path} is not the shard that its index tells of; delete it and run `dvc repro`")


def _form(layout: Mapping[str, StoredTensor]) -> dict[str, tuple]:
    return {name: (stored.dtype, stored.shape[1:]) for name, stored in layout.items()}


def _read_places(file: BinaryIO, offset: int, places: np.ndarray, into: np.ndarray) -> None:
    """Read the rows at ``places``, ascending, of a tensor that begins at ``offset`` into bytes, one after the other."""
    if not len(places):
        return
    size = len(into) // len(places)
    edges = np.flatnonzero(np.diff(places) > 1 + GAP // size) + 1
    for start, stop in zip([0, *edges], [*edges, len(places)], strict=True):
        first, last = int(places[start]), int(places[stop - 1])
        wanted = into[start * size : stop * size]
        if (np.diff(places[start:stop]) == 1).all():
            _fill(file, offset + first * size, wanted)
        else:
            piece = np.empty((last + 1 - first, size), np.uint8)
            _fill(file, offset + first * size, piece.reshape(-1))
            np.take(piece, places[start:stop] - first, axis=0, out=wanted.reshape(-1, size))


def _fill(file: BinaryIO, offset: int, into: np.ndarray) -> None:
    file.seek(offset)
    rest = memoryview(into)
    while len(rest):
        if not (count := file.readinto(rest)):
            raise DamagedShardError(f"{file.name} ended while it was read; delete it and run `dvc repro`")
        rest = rest[count:]
