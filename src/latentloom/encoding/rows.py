"""Tensor rows in safetensors shards, each row keyed by the content that it was computed from.

    keys  ->  shards of SHARD_ROWS rows (the stage's outs)  <->  the same files, hard-linked, in the row store

A shard that the store has is linked; of any other shard, the rows that the store knows are copied and only the rest is
computed. A finished shard enters the store at once, so a killed stage loses at most the shard it was working on. The
store may be deleted at any time: it only saves work.
"""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latentloom.files import atomic_path

SHARD_ROWS = 1024
FORMAT_VERSION = 1

Tensors = dict[str, torch.Tensor]


def row_key(*parts: str) -> str:
    """The key of a row: a hash of everything that decides its content."""
    return hashlib.sha256("|".join([*parts, f"v{FORMAT_VERSION}"]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One finished shard: its file, its rows' positions in the whole, its tensors, and how many rows were computed."""

    path: Path
    positions: range
    tensors: Tensors
    computed: int


class RowStore:
    """The shards that earlier runs left in a folder, looked up by row key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._learn(path, _read_keys(path))
            except (SafetensorError, OSError, KeyError) as error:
                warnings.warn(
                    f"{path} is damaged and will not be used ({error}); its rows are computed again", stacklevel=2
                )
                path.unlink(missing_ok=True)

    def path_for(self, keys: Sequence[str]) -> Path:
        """Where the shard of exactly these rows lies, or would lie."""
        return self.folder / f"{hashlib.sha256(''.join(keys).encode()).hexdigest()}.safetensors"

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, path: Path, keys: Sequence[str]) -> None:
        """Take in a shard that was just written at ``path``."""
        self._learn(path, keys)

    def rows(self, keys: Sequence[str]) -> Tensors:
        """The stored rows of ``keys``, in that order."""
        by_path: dict[Path, list[int]] = {}
        for index, key in enumerate(keys):
            by_path.setdefault(self._places[key][0], []).append(index)
        result: Tensors = {}
        for path, indexes in by_path.items():
            for name, tensor in load_shard(path).items():
                target = result.setdefault(name, tensor.new_empty((len(keys), *tensor.shape[1:])))
                target[indexes] = tensor[[self._places[keys[index]][1] for index in indexes]]
        return result

    def _learn(self, path: Path, keys: Sequence[str]) -> None:
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path, row))


def write_shards(
    out: Path,
    store: RowStore,
    keys: Sequence[str],
    compute: Callable[[Sequence[int]], Tensors],
) -> Iterator[Shard]:
    """Write the rows of ``keys``, in order, as shards in ``out``, computing only those that ``store`` does not know.

    Args:
        out: the folder for ``00000.safetensors`` and so on.
        store: rows of earlier runs.
        keys: one key a row.
        compute: takes ascending positions in ``keys`` and gives their rows, as tensors (len(positions), ...).

    Yields:
        Each shard once its file is complete under its final name.
    """
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(keys), SHARD_ROWS)):
        positions = range(start, min(start + SHARD_ROWS, len(keys)))
        own_keys = [keys[position] for position in positions]
        stored = store.path_for(own_keys)
        computed = 0
        if not stored.exists():
            missing = [position for position in positions if keys[position] not in store]
            computed = len(missing)
            save_shard(stored, _assemble(store, keys, positions, missing, compute), own_keys)
            store.add(stored, own_keys)
        path = out / f"{number:05d}.safetensors"
        _link(stored, path)
        yield Shard(path, positions, load_shard(path), computed)


def _assemble(
    store: RowStore,
    keys: Sequence[str],
    positions: range,
    missing: list[int],
    compute: Callable[[Sequence[int]], Tensors],
) -> Tensors:
    fresh = compute(missing) if missing else {}
    known = [position for position in positions if keys[position] in store]
    old = store.rows([keys[position] for position in known]) if known else {}
    tensors: Tensors = {}
    for name in fresh or old:
        example = (fresh or old)[name]
        tensors[name] = example.new_empty((len(positions), *example.shape[1:]))
        for group, source in ((missing, fresh), (known, old)):
            if group:
                tensors[name][[position - positions.start for position in group]] = source[name]
    return tensors


def save_shard(path: Path, tensors: Tensors, keys: Sequence[str]) -> None:
    """Write one shard atomically; its header holds the keys of its rows. The same rows give the same bytes."""
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"keys": ",".join(keys)},
        )


def load_shard(path: Path) -> Tensors:
    """A shard's tensors, by memory map.

    Raises:
        ValueError: when the file is missing or damaged, naming it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); delete it and run `dvc repro`") from error


def load_rows(folder: Path, shards: Sequence[str], rows: np.ndarray) -> Tensors:
    """The rows that an index names, in its order: row ``rows[i]`` of the file ``shards[i]`` in ``folder``."""
    names = np.asarray(shards)
    result: Tensors = {}
    for shard in dict.fromkeys(shards):
        here = np.flatnonzero(names == shard)
        for name, tensor in load_shard(folder / shard).items():
            target = result.setdefault(name, tensor.new_empty((len(names), *tensor.shape[1:])))
            target[torch.from_numpy(here)] = tensor[torch.from_numpy(np.asarray(rows)[here].astype(np.int64))]
    return result


def _read_keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {})["keys"].split(",")


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link where the disk can, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            temporary.write_bytes(source.read_bytes())
