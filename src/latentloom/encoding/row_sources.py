"""Where the rows of a cache are while a training reads them: on its device, or still on the disk.

    NNNNN.safetensors shards, fp16  ->  RowIndex: which row is in which shard
                                        InMemoryRows: all of them on the device; a batch is an index there
                                        MemmapRows: mapped from the disk; a batch is copied to the device

Both give the same bytes for the same rows, raw as they are stored, so where the rows are never changes a result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.shard_files import DamagedShardError, Tensors, load_shard

Rows = torch.Tensor | slice  # numbers of rows (B,), int64, on any device; or a range of them


class RowSource(Protocol):
    """Rows of tensors that are read together, such as ``mean`` and ``std`` of latents.

    Attributes:
        device: where `gather` puts rows.
        streamed: whether rows stay on the disk until a batch asks for them.
        shapes: the shape of one row of each tensor.
    """

    device: torch.device
    streamed: bool
    shapes: dict[str, tuple[int, ...]]

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for, on the device."""
        ...


class InMemoryRows:
    """Rows of tensors (N, ...) on one device; `gather` is an index there and never waits for the device."""

    streamed = False

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.device = next(iter(tensors.values())).device
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}

    def gather(self, rows: Rows) -> Tensors:
        return {name: tensor[rows] for name, tensor in self._tensors.items()}


@dataclass(frozen=True)
class RowIndex:
    """Where each row is: row i is row ``rows[i]`` of the shard ``paths[shards[i]]``."""

    paths: list[Path]
    shards: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, folder: Path, shards: pd.Series, rows: pd.Series) -> "RowIndex":
        """The rows of an index table, which has for each a shard's file name in ``folder`` and a row of that shard."""
        codes, names = pd.factorize(shards)
        return cls([folder / name for name in names], codes.astype(np.int32), rows.to_numpy(np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: np.ndarray | slice) -> "RowIndex":
        return RowIndex(self.paths, self.shards[rows], self.rows[rows])

    def __add__(self, others: "RowIndex") -> "RowIndex":
        """These rows, then the others."""
        return RowIndex(
            self.paths + others.paths,
            np.concatenate([self.shards, others.shards + np.int32(len(self.paths))]),
            np.concatenate([self.rows, others.rows]),
        )

    def nbytes(self) -> int:
        """The bytes that all rows take; one shard is opened to see how large a row is.

        Raises:
            DamagedShardError: when that shard is missing or damaged.
        """
        return len(self) * sum(tensor[:1].nbytes for tensor in load_shard(self.paths[0]).values())

    def load(self, device: torch.device) -> InMemoryRows:
        """Read all rows onto ``device``, shard by shard.

        Raises:
            DamagedShardError: when a shard is missing or damaged, naming it.
        """
        opener = _ShardOpener(self)
        loaded = {
            name: torch.empty((len(self), *tensor.shape[1:]), dtype=tensor.dtype, device=device)
            for name, tensor in opener.first.items()
        }
        by_shard = np.argsort(self.shards, kind="stable")
        ends = np.searchsorted(self.shards[by_shard], np.arange(1, len(self.paths)))
        for number, places in enumerate(np.split(by_shard, ends)):
            if len(places):
                wanted, target = torch.from_numpy(self.rows[places]), torch.from_numpy(places).to(device)
                for name, tensor in opener.open(number).items():
                    loaded[name].index_copy_(0, target, tensor[wanted].to(device))
        return InMemoryRows(loaded)


class MemmapRows:
    """Rows that stay in their shards, which are mapped into memory; `gather` copies a batch to the device.

    A map needs no open file descriptor, and its pages are the system's to take back. A shard that is deleted later can
    still be read.

    Raises:
        DamagedShardError: when a shard is missing or damaged, naming it.
    """

    streamed = True

    def __init__(self, index: RowIndex, device: torch.device) -> None:
        opener = _ShardOpener(index)
        self._dtypes = {name: tensor.dtype for name, tensor in opener.first.items()}
        shards = [opener.open(number) for number in range(len(index.paths))]
        self._flat = {name: [_flat(shard[name]) for shard in shards] for name in opener.first}
        self._index = index
        self.device = device
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in opener.first.items()}

    def gather(self, rows: Rows) -> Tensors:
        chosen = self._index[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        shards, numbers = chosen.shards.tolist(), chosen.rows.tolist()
        return {
            name: self._copied(name, [flat[shard][row] for shard, row in zip(shards, numbers, strict=True)])
            for name, flat in self._flat.items()
        }

    def _copied(self, name: str, rows: Sequence[np.ndarray]) -> torch.Tensor:
        # From pinned memory the copy to a GPU is asynchronous; torch reuses that memory only when the copy is done.
        host = torch.empty(
            (len(rows), *self.shapes[name]), dtype=self._dtypes[name], pin_memory=self.device.type == "cuda"
        )
        if rows:
            np.concatenate(rows, out=host.view(-1).numpy())
        return host.to(self.device, non_blocking=True)


class _ShardOpener:
    """Opens the shards of an index, and compares each with what the index and the first shard say of it."""

    def __init__(self, index: RowIndex) -> None:
        self.paths = index.paths
        self.first = load_shard(index.paths[0])
        self.fewest = np.zeros(len(index.paths), dtype=np.int64)
        np.maximum.at(self.fewest, index.shards, index.rows + 1)

    def open(self, number: int) -> Tensors:
        path, tensors = self.paths[number], load_shard(self.paths[number])
        if {name: _row(tensor) for name, tensor in tensors.items()} != {n: _row(t) for n, t in self.first.items()}:
            raise DamagedShardError(
                f"{path} holds other tensors than {self.paths[0]}; delete the one that is wrong and run `dvc repro`"
            )
        if (rows := min(map(len, tensors.values()))) < self.fewest[number]:
            raise DamagedShardError(
                f"{path} has {rows} rows, but its index names row {self.fewest[number] - 1}; delete it and run "
                "`dvc repro`"
            )
        return tensors


def _row(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape[1:], tensor.dtype


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(len(tensor), math.prod(tensor.shape[1:])).numpy()
