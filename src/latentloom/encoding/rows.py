"""Tensor rows keyed by the content that they were computed from, written as shards.

    keys  ->  00000.safetensors, 00001.safetensors, ... (the stage's outs)

A shard that the row store has is linked; of any other shard, the rows that the store knows are copied and only the rest
is computed, in full batches across shards. A finished shard enters the store at once, so a killed stage loses at most
the shard that it was working on.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.row_store import SHARDS, RowStore
from latentloom.encoding.tensor_shards import Tensors, load_shard, save_shard
from latentloom.sharding import shard_ranges

FORMAT_VERSION = 2

Compute = Callable[[Sequence[int]], Iterable[Tensors]]


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


def write_shards(
    out: Path, store: RowStore, ids: Sequence[str], keys: Sequence[str], compute: Compute
) -> Iterator[Shard]:
    """Write the rows of ``keys``, in order, as shards in ``out``, computing only those that ``store`` does not know.

    Args:
        out: the folder for ``00000.safetensors`` and so on; other shards that lie there are deleted at the end.
        store: rows of earlier runs.
        ids: what each row is of, as a hash; they decide where shards end, so that this depends on no encoder.
        keys: one key a row.
        compute: takes ascending positions in ``keys`` and gives their rows, in batches of any size, as tensors
            (rows, ...).

    Yields:
        Each shard once its file is complete under its final name.

    Raises:
        OSError: when the disk is full, naming the file; the shards before it are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    ranges = shard_ranges(ids)
    own_keys = [[keys[position] for position in positions] for positions in ranges]
    to_compute = [
        []
        if store.has_shard(own)
        else [position for position, key in zip(positions, own, strict=True) if key not in store]
        for positions, own in zip(ranges, own_keys, strict=True)
    ]
    fresh = _Rows(compute([position for positions in to_compute for position in positions]))
    names = set()
    for number, (positions, own, new) in enumerate(zip(ranges, own_keys, to_compute, strict=True)):
        path = out / f"{number:05d}.safetensors"
        computed = len(new)
        if new or not store.give_shard(own, path):
            pieces = [(new, fresh.take(len(new)))] if new else []
            pieces += store.rows({position: keys[position] for position in positions if position not in set(new)})
            lost = sorted(set(positions).difference(*(piece for piece, _ in pieces)))
            if lost:  # they were deleted or damaged since the plan was made
                pieces.append((lost, _Rows(compute(lost)).take(len(lost))))
            save_shard(path, _assemble(positions, pieces), own)
            store.add(path, own)
            computed += len(lost)
        names.add(path.name)
        yield Shard(path, positions, load_shard(path), computed)
    for path in [*out.glob(SHARDS), *out.glob(".*.tmp")]:
        if path.name not in names:
            path.unlink()


def load_rows(folder: Path, shards: Sequence[str], rows: np.ndarray) -> Tensors:
    """The rows that an index names, in its order: row ``rows[i]`` of the file ``shards[i]`` in ``folder``.

    Raises:
        ValueError: when a shard is missing or damaged, naming it.
    """
    codes, names = pd.factorize(np.asarray(shards, dtype=object))
    by_shard = np.argsort(codes, kind="stable")
    places = np.split(by_shard, np.searchsorted(codes[by_shard], np.arange(1, len(names))))
    result: Tensors = {}
    for shard, here in zip(names, places, strict=False):
        wanted = torch.from_numpy(np.asarray(rows)[here].astype(np.int64))
        for name, tensor in load_shard(folder / shard).items():
            target = result.setdefault(name, tensor.new_empty((len(codes), *tensor.shape[1:])))
            target[torch.from_numpy(here)] = tensor[wanted]
    return result


class _Rows:
    """Rows that come in batches, handed out in portions of any size; a batch is asked for when it is needed."""

    def __init__(self, batches: Iterable[Tensors]) -> None:
        self._batches = iter(batches)
        self._waiting: list[Tensors] = []
        self._count = 0

    def take(self, count: int) -> Tensors:
        while self._count < count:
            batch = next(self._batches)
            self._waiting.append(batch)
            self._count += len(next(iter(batch.values())))
        joined = {name: torch.cat([batch[name] for batch in self._waiting]) for name in self._waiting[0]}
        self._count -= count
        self._waiting = [{name: tensor[count:] for name, tensor in joined.items()}] if self._count else []
        return {name: tensor[:count] for name, tensor in joined.items()}


def _assemble(positions: range, pieces: Iterable[tuple[list[int], Tensors]]) -> Tensors:
    tensors: Tensors = {}
    for places, rows in pieces:
        index = torch.tensor(places) - positions.start
        for name, tensor in rows.items():
            target = tensors.setdefault(name, tensor.new_empty((len(positions), *tensor.shape[1:])))
            target[index] = tensor
    return tensors
