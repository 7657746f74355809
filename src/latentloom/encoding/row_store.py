"""The row store: finished shards of all earlier runs on this machine, looked up by the keys of their rows.

It lies in ``.state/``, beside the stages' outs, and holds the very files of the outs by hard link, so that it takes
room only for what no out has any more. It only saves work: it may be deleted at any time, also while a stage runs.
Nothing damaged is ever served: each shard is held against its checksum before its rows are used.
"""

import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from latentloom.encoding.tensor_shards import DamagedShardError, Tensors, load_checked, read_keys
from latentloom.files import atomic_path

SHARDS = "*.safetensors"


class RowStore:
    """The shards that earlier runs left in ``folder``.

    Args:
        folder: need not exist.
        limit: bytes; `trim` keeps at most so many of shards that this run did not use.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def has_shard(self, keys: Sequence[str]) -> bool:
        """Whether a shard of exactly these rows is there."""
        return self._path(keys).is_file()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def give_shard(self, keys: Sequence[str], target: Path) -> bool:
        """Put the shard of exactly these rows at ``target``; False where it is not there, or damaged."""
        path = self._path(keys)
        if not path.is_file() or self._load(path) is None:
            return False
        try:
            _link(path, target)
        except FileNotFoundError:  # somebody deleted the store since
            return False
        self._touch(path)
        return True

    def rows(self, wanted: Mapping[int, str]) -> Iterator[tuple[list[int], Tensors]]:
        """The known rows of ``wanted`` (position -> key), as (positions, rows) a stored shard; others are left out."""
        by_path: dict[Path, list[int]] = {}
        for position, key in wanted.items():
            if key in self._places:
                by_path.setdefault(self._places[key][0], []).append(position)
        for path, positions in by_path.items():
            if (tensors := self._load(path)) is not None:
                rows = [self._places[wanted[position]][1] for position in positions]
                yield positions, {name: tensor[rows] for name, tensor in tensors.items()}

    def add(self, shard: Path, keys: Sequence[str]) -> None:
        """Take in a shard that was just written; a store that cannot take it costs a warning, never the shard."""
        path = self._path(keys)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _link(shard, path)
            self._touch(path)
        except OSError as error:
            warnings.warn(f"{path} could not be kept ({error}); a later run will compute its rows again", stacklevel=2)

    def trim(self) -> None:
        """Delete the shards that were not used for the longest time, until the others fit into the limit."""
        entries = []
        for path in self.folder.glob(SHARDS):
            if path.name not in self._used:
                try:
                    entries.append((path.stat(), path))
                except FileNotFoundError:  # another run trimmed it
                    continue
        room = self.limit
        for status, path in sorted(entries, key=lambda entry: entry[0].st_atime_ns, reverse=True):
            room -= status.st_size
            if room < 0:
                path.unlink(missing_ok=True)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, int]]:
        """Key -> (shard, row) of every stored row."""
        places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob(SHARDS)):
            try:
                for row, key in enumerate(read_keys(path)):
                    places.setdefault(key, (path, row))
            except DamagedShardError as error:
                _drop(path, error)
        return places

    def _path(self, keys: Sequence[str]) -> Path:
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()}.safetensors"

    def _load(self, path: Path) -> Tensors | None:
        try:
            return load_checked(path)
        except DamagedShardError as error:
            if path.exists():
                _drop(path, error)
            return None

    def _touch(self, path: Path) -> None:
        """Mark a shard as used now, by its access time: another modification time would make DVC hash it anew."""
        self._used.add(path.name)
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _drop(path: Path, error: DamagedShardError) -> None:
    warnings.warn(f"{path} will not be used: {error}. Its rows are computed again.", stacklevel=3)
    path.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link where the disk can, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        with atomic_path(target, room=source.stat().st_size) as temporary:
            shutil.copyfile(source, temporary)
