"""The content-keyed cache: rows of tensors, such as latents and embeddings, that are computed once per content.

A *key* is a hash of everything that decides a row's bytes: the image or the caption, the encoder's weights, the
preprocessing, the dtypes. Equal keys mean equal bytes, so nothing is ever invalidated: what changed has another key.

A *shard* is a safetensors file of consecutive rows. Its header lists their keys and a checksum, and the same rows give
the same bytes. The rows' own ids decide where a shard ends (`latentloom.sharding`), so one added row changes one shard.

The *store* holds the finished shards of all earlier runs on this machine, each named by a hash of its keys. It lies in
``.state/``, beside the stages' outs, and holds the very files of the outs by hard link, so that it takes room only for
what no out has any more. It only saves work: it may be deleted at any time, also while a stage runs.

A stage gets its rows in three steps:

    plan = Plan(store, out, ids, keys)         link every shard that the store has; find the rows of the others there
    batches = ...                              compute the rows ``plan.missing``, in full batches across shards
    for shard in plan.write(batches): ...      assemble the other shards from rows that were found or computed

A finished shard enters the store at once, so a killed stage loses at most the shard that it was working on.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from latentloom import sharding
from latentloom.encoding.shard_files import (
    ENDS,
    SHARDS,
    DamagedShardError,
    Tensors,
    load_shard,
    ragged,
    ragged_names,
    read_shard,
)
from latentloom.files import atomic_path, link_file
from latentloom.ids import from_hex

FORMAT_VERSION = 2
HEADER = "latentloom"  # one entry, since safetensors writes several in an order that changes from run to run

Row = tuple[Tensors, int]  # the tensors that hold it, and its number there


def row_key(*parts: str) -> str:
    """The key of a row: a hash of everything that decides its content."""
    return hashlib.sha256("|".join([*parts, f"v{FORMAT_VERSION}"]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file, which of all rows it holds, and its tensors (rows, ...)."""

    path: Path
    rows: slice
    tensors: Tensors


@dataclass(frozen=True)
class EncodeCounts:
    """How many rows a stage wrote, how many of them it had to compute, and how many images it rejected."""

    rows: int
    encoded: int
    rejected: int = 0

    @property
    def reused(self) -> int:
        """Rows that an earlier run had computed."""
        return self.rows - self.encoded


class RowStore:
    """The shards that earlier runs left in ``folder``. A shard is compared with its checksum before a row is used.

    Args:
        folder: need not exist.
        limit: bytes; `trim` keeps at most so many of shards that this run did not use.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def adopt(self, shards: Iterable[Path]) -> None:
        """Take in shards that another machine wrote; what is no shard of this format is skipped."""
        for path in shards:
            with suppress(DamagedShardError):
                _, keys, _ = _open(path)
                if not self._path(keys).is_file():
                    self.add(path, keys)

    def add(self, shard: Path, keys: Sequence[str]) -> None:
        """Take in a shard; a store that cannot take it costs a warning, never the shard."""
        path = self._path(keys)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            link_file(shard, path)
            self._touch(path)
        except OSError as error:
            warnings.warn(f"{path} could not be kept ({error}); a later run will compute its rows again", stacklevel=2)

    def link(self, keys: Sequence[str], target: Path) -> bool:
        """Put the shard of exactly these rows at ``target``; False where it is not there, or damaged."""
        path = self._path(keys)
        if self._read(path, set(keys)):
            with suppress(FileNotFoundError):  # the store was deleted in the meantime
                link_file(path, target)
                self._touch(path)
                return True
        return False

    def find(self, keys: Collection[str]) -> dict[str, Row]:
        """Where the known ones of ``keys`` are.

        The tensors are memory maps: they can be read even if the store is deleted later.
        """
        found: dict[str, Row] = {}
        wanted = set(keys)
        for path in sorted(self.folder.glob(SHARDS)) if wanted else ():
            rows = self._read(path, wanted)
            found |= rows
            wanted -= rows.keys()
        return found

    def trim(self) -> None:
        """Delete the least recently used shards until the others fit into the limit; those of this run stay."""
        entries = []
        for path in self.folder.glob(SHARDS):
            with suppress(FileNotFoundError):  # another run trimmed it
                if path.name not in self._used:
                    entries.append((path.stat(), path))
        room = self.limit
        for status, path in sorted(entries, key=lambda entry: entry[0].st_atime_ns, reverse=True):
            room -= status.st_size
            if room < 0:
                path.unlink(missing_ok=True)

    def _read(self, path: Path, keys: Collection[str]) -> dict[str, Row]:
        """Those rows of a stored shard that are asked for; a damaged shard is deleted: its rows are computed again."""
        try:
            tensors, own_keys, checksum = _open(path)
            rows = {key: (tensors, row) for row, key in enumerate(own_keys) if key in keys}
            if rows and checksum != _checksum(tensors):
                raise DamagedShardError("its checksum is another")
            return rows
        except DamagedShardError as error:
            if path.exists():
                warnings.warn(f"{path} will not be used: {error}. Its rows are computed again.", stacklevel=3)
                path.unlink(missing_ok=True)
            return {}

    def _path(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()}.safetensors"

    def _touch(self, path: Path) -> None:
        """Mark a shard as used now, by its access time: another modification time would make DVC hash it again."""
        self._used.add(path.name)
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


class Plan:
    """Where the rows of a cache come from. To make one puts every shard that the store has at its place in ``out``.

    Args:
        store: the shards of earlier runs.
        out: the folder for ``00000.safetensors`` and so on.
        ids: what each row is of, as a hash; they decide where shards end, so that this depends on no encoder.
        keys: one key per row.
        groups: one per row, such as the shape of its tensors; rows of two groups never share a shard.

    Attributes:
        missing: the positions of the rows that have to be computed, ascending.
    """

    def __init__(
        self,
        store: RowStore,
        out: Path,
        ids: Sequence[str],
        keys: Sequence[str],
        groups: Sequence[Any] = (),
        row_bytes=1,
    ) -> None:
        self._store, self._out, self._keys = store, out, keys
        numbers = np.unique(groups, return_inverse=True, axis=0)[1] if len(groups) else None
        ranges = sharding.shard_ranges(from_hex(ids), row_bytes, sharding.TENSORS, numbers)
        self._shards = {out / f"{number:05d}.safetensors": rows for number, rows in enumerate(ranges)}
        self._linked: set[Path] = set()
        out.mkdir(parents=True, exist_ok=True)
        wanted: dict[str, int] = {}
        for path, positions in self._shards.items():
            own = keys[positions.start : positions.stop]
            if store.link(own, path):
                self._linked.add(path)
            else:
                wanted |= dict(zip(own, positions, strict=True))
        self._found = store.find(wanted.keys())
        self.missing = [position for key, position in wanted.items() if key not in self._found]

    def write(self, batches: Iterable[Tensors], stage: str = "", unit: str = "row") -> Iterator[Shard]:
        """Write the shards that the store did not have; other shards that are in the folder are deleted at the end.

        Args:
            batches: the rows ``missing``, in order, in batches of any size, as a shard's tensors; the first of them
                is (rows, ...).
            stage, unit: for the progress bar: its title, and what a row is of.

        Yields:
            Every shard in order, once its file is complete under its final name.

        Raises:
            WriteError: when the disk is full, naming the file; the shards before it are kept.
        """
        known = len(self._keys) - len(self.missing)
        with tqdm(total=len(self._keys), initial=known, desc=stage, unit=unit) as progress:
            computed = _rows(batches, progress)
            for path, positions in self._shards.items():
                rows = slice(positions.start, positions.stop)
                if path not in self._linked:
                    keys = self._keys[rows]
                    save_shard(path, _stack([self._found.get(key) or next(computed) for key in keys]), keys)
                    self._store.add(path, keys)
                yield Shard(path, rows, load_shard(path))
        for path in [*self._out.glob(SHARDS), *self._out.glob(".*.tmp")]:
            if path not in self._shards:
                path.unlink()


def save_shard(path: Path, tensors: Tensors, keys: Sequence[str]) -> None:
    """Write one shard atomically.

    Raises:
        WriteError: naming the file and the room it needs, when the disk is full.
    """
    content = save(tensors, {HEADER: json.dumps({"checksum": _checksum(tensors), "keys": list(keys)})})
    with atomic_path(path, room=len(content)) as temporary:
        temporary.write_bytes(content)


def _rows(batches: Iterable[Tensors], progress: tqdm) -> Iterator[Row]:
    for batch in batches:
        size = len(next(iter(batch.values())))
        progress.update(size)
        for row in range(size):
            yield batch, row


def _stack(rows: Sequence[Row]) -> Tensors:
    """The tensors of a shard, put together from those of its rows: of one shape, unless a tensor is ragged."""
    first = rows[0][0]
    of_lengths = ragged_names(first)
    stacked: Tensors = {}
    for name in of_lengths:
        stacked |= ragged([_items(tensors, name, row) for tensors, row in rows], name)
    return stacked | {
        name: torch.stack([tensors[name][row] for tensors, row in rows]) for name in first if name not in stacked
    }


def _items(tensors: Tensors, name: str, row: int) -> torch.Tensor:
    ends = tensors[name + ENDS]
    return tensors[name][int(ends[row - 1]) if row else 0 : int(ends[row])]


def _open(path: Path) -> tuple[Tensors, list[str], str]:
    """A shard's tensors, mapped but not read, its rows' keys and its checksum.

    Raises:
        DamagedShardError: when the file is missing, damaged, or no shard of this format.
    """
    tensors, metadata = read_shard(path)
    if HEADER not in metadata:
        raise DamagedShardError(f"{path} lists no keys")
    header = json.loads(metadata[HEADER])
    return tensors, header["keys"], header["checksum"]


def _checksum(tensors: Tensors) -> str:
    """The SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{list(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
