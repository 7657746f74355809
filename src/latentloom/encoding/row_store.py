"""The store of the caches: the finished shards of all earlier runs on this machine, each named by a hash of its keys.

It lies in ``.state/``, beside the stages' outs, and holds the very files of the outs by hard link, so that it takes
room only for what no out has any more. It only saves work: it may be deleted at any time, also while a stage runs.

    <64 digits>.safetensors   a shard, named by the hash of its rows' keys
    keys.index                the keys of all rows, so that no shard is opened to find one; made anew if missing
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from latentloom.encoding.shard_files import SHARDS, DamagedShardError, Tensors, read_shard
from latentloom.files import link_file
from latentloom.ids import ID_BYTES, from_hex, positions
from latentloom.tensor_files import read_tensors, save_tensors

HEADER = "latentloom"  # one entry, since safetensors writes several in an order that changes from run to run
KEYS = "keys.index"
MAPPED_SHARDS = 2**14  # at any time; Linux lets a process have four times as many


class RowStore:
    """The shards that earlier runs left in ``folder``.

    Args:
        folder: need not exist.
        limit: bytes; `trim` keeps at most so many of shards that this run did not use.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def path(self, name: str) -> Path:
        """Where the shard of this `shard_name` is, if it is there."""
        return self.folder / f"{name}.safetensors"

    def names(self) -> set[str]:
        """Those of all shards."""
        return {path.stem for path in self.folder.glob("?" * 2 * ID_BYTES + ".safetensors")}

    def adopt(self, shards: Iterable[Path]) -> None:
        """Take in shards that another machine wrote; what is no shard of this format is skipped."""
        for path in shards:
            with suppress(DamagedShardError):
                self.add(path, self.path(shard_name(_keys(path))))

    def add(self, shard: Path, stored: Path) -> None:
        """Take in a shard, unless it is there, and count it as used by this run."""
        keep(shard, stored)
        with suppress(OSError):
            # Marked by its access time: another modification time would make DVC hash it again.
            os.utime(stored, ns=(time.time_ns(), stored.stat().st_mtime_ns))
            self._used.add(stored.name)

    def find(self, keys: np.ndarray) -> tuple[list[Path], np.ndarray, np.ndarray]:
        """Which shard has the rows of ``keys``, uint8 (N, 32).

        Returns:
            the shards; for each key the number of its shard (N,), -1 where none has it; and of its row there (N,).
        """
        if not len(keys):
            return [], np.empty(0, np.int32), np.empty(0, np.int32)
        names, counts, stored = self._index()
        ends = counts.cumsum()
        places = positions(keys, stored)
        shard = np.searchsorted(ends, places, side="right").astype(np.int32)
        row = np.where(places < 0, -1, places - np.append(ends - counts, 0)[shard]).astype(np.int32)
        shard[places < 0] = -1
        return [self.path(name) for name in names], shard, row

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

    def _index(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Names of all shards, how many rows each has, and the keys of these, one shard's after the other's."""
        names = sorted(self.names())
        known: dict[str, np.ndarray] = {}
        with suppress(SafetensorError, OSError, KeyError):
            tensors = {name: tensor.numpy() for name, tensor in read_tensors(self.folder / KEYS)[0].items()}
            counts, keys = tensors["rows"], tensors["keys"]
            own_names = [name.tobytes().hex() for name in tensors["shards"]]
            if own_names == names:
                return names, counts, keys
            known = dict(zip(own_names, np.split(keys, counts.cumsum()[:-1]), strict=True))
        parts = [np.empty((0, ID_BYTES), np.uint8)]
        for name in names:
            own = known.get(name)
            with suppress(DamagedShardError):  # which is said, and mended, by who wants its rows
                own = _keys(self.path(name)) if own is None else own
            parts.append(parts[0] if own is None else own)
        counts, keys = np.array([len(part) for part in parts[1:]], np.int64), np.concatenate(parts)
        if names:
            columns = {"shards": from_hex(names), "rows": counts, "keys": keys}
            with suppress(OSError):
                save_tensors(self.folder / KEYS, {name: torch.from_numpy(own) for name, own in columns.items()})
        return names, counts, keys


def shard_name(keys: np.ndarray) -> str:
    """The name of the shard of these rows, uint8 (N, 32): 64 hexadecimal digits."""
    return hashlib.sha256(keys.tobytes().hex().encode()).hexdigest()


def checksum(tensors: Tensors) -> str:
    """The SHA-256 of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{list(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def keep(shard: Path, stored: Path) -> None:
    """Put a shard into the store; one that cannot take it costs a warning, never the shard."""
    try:
        if not stored.is_file():
            stored.parent.mkdir(parents=True, exist_ok=True)
            link_file(shard, stored)
    except OSError as error:
        warnings.warn(f"{stored} could not be kept ({error}); a later run will compute its rows again", stacklevel=2)


def link_stored(stored: Path, name: str, target: Path) -> bool:
    """Put a stored shard at ``target``; False where it is not there, or damaged."""
    if _verified(stored, name) is None:
        return False
    with suppress(FileNotFoundError):  # the store was deleted in the meantime
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file(stored, target)
        return True
    return False


class Stored(NamedTuple):
    """A stored shard: its tensors, mapped, and its rows' keys, uint8 (N, 32)."""

    tensors: Tensors
    keys: np.ndarray


def stored_rows(stored: Path, name: str) -> Stored | None:
    """A stored shard; None where it is not there, or damaged.

    Rows may be wanted from any shard by any task. The last used stay mapped, so that each is compared with its
    checksum once.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        status = stored.stat()
        return _mapped(stored, name, status.st_ino, status.st_size, status.st_mtime_ns)
    return None


@lru_cache(MAPPED_SHARDS)
def _mapped(stored: Path, name: str, *_: int) -> Stored | None:
    return _verified(stored, name)


def _verified(stored: Path, name: str) -> Stored | None:
    """A stored shard; a damaged one is deleted: its rows are computed again."""
    try:
        tensors, metadata = read_shard(stored)
        header = _header(stored, metadata)
        keys = from_hex(header["keys"])
        if header["checksum"] != checksum(tensors) or shard_name(keys) != name:
            raise DamagedShardError("its checksum is another")
        return Stored(tensors, keys)
    except DamagedShardError as error:
        if stored.exists():
            warnings.warn(f"{stored} will not be used: {error}. Its rows are computed again.", stacklevel=4)
            stored.unlink(missing_ok=True)
        return None


def _keys(path: Path) -> np.ndarray:
    """The keys of a shard's rows, uint8 (N, 32).

    Raises:
        DamagedShardError: when the file is missing, damaged, or no shard of this format.
    """
    return from_hex(_header(path, read_shard(path)[1])["keys"])


def _header(path: Path, metadata: dict[str, str]) -> dict:
    if HEADER not in metadata:
        raise DamagedShardError(f"{path} lists no keys")
    return json.loads(metadata[HEADER])
