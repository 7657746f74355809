"""Where the rows of a cache are while a training reads them: on its device, or still on the disk.

    NNNNN.safetensors shards, fp16  ->  StreamedRows: mapped from the disk; a batch is copied to the device
                                        InMemoryRows: all of them on the device; a batch is an index there

Both give the same bytes for the same rows, raw as they are stored, so where the rows are never changes a result.

Rows of different lengths, such as the token states of captions, are padded with zeros to the longest of all, so that
batches have one shape: NAME (B, longest, ...) comes with NAME_mask (B, longest), which says what is no padding.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.shard_files import (
    ENDS,
    DamagedShardError,
    Tensors,
    load_shard,
    ragged_lengths,
    ragged_names,
)

ROWS_AT_ONCE = 4096
MASK = "_mask"

Rows = torch.Tensor | slice  # numbers of rows (B,), int64, on any device; or a range of them


class InMemoryRows:
    """Rows of tensors (N, ...) on one device, such as ``mean`` and ``std`` of latents, in the form of one shard.

    Attributes:
        device: where `gather` puts rows.
        streamed: whether rows stay on the disk until a batch asks for them.
        shapes: the shape of one row of each tensor, of the longest one where lengths differ.
    """

    streamed = False

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = {name: tensor for name, tensor in tensors.items() if not _is_ragged(name, tensors)}
        self.device = next(iter(tensors.values())).device
        self.shapes, _ = _form(self._tensors)
        self._ragged = {}
        for name in ragged_names(tensors):
            items, lengths = tensors[name], ragged_lengths(tensors, name)
            self._ragged[name] = (items, tensors[name + ENDS] - lengths, lengths)
            self.shapes[name] = (int(lengths.max()) if len(lengths) else 0, *items.shape[1:])

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for; never waits for the device."""
        gathered = {name: tensor[rows] for name, tensor in self._tensors.items()}
        for name, (items, starts, lengths) in self._ragged.items():
            steps = torch.arange(self.shapes[name][0], device=self.device)
            mask = steps < lengths[rows].unsqueeze(1)
            padded = items[torch.where(mask, starts[rows].unsqueeze(1) + steps, 0)]
            padded.masked_fill_(~mask.reshape(*mask.shape, *[1] * (padded.ndim - 2)), 0)
            gathered |= {name: padded, name + MASK: mask}
        return gathered


class StreamedRows:
    """Rows that stay in their shards, which are mapped into memory; the same attributes as `InMemoryRows`.

    A map needs no open file descriptor, and its pages are the system's to take back. A shard that is deleted later can
    still be read.

    Args:
        folders: each has the same shards; the rows of the second follow those of the first, and so on.
        shards: for each row, the file name of its shard.
        rows: for each row, its place in that shard.
        device: where `gather` puts rows.

    Raises:
        DamagedShardError: when a shard is missing or damaged, naming it.
    """

    streamed = True

    def __init__(self, folders: Sequence[Path], shards: pd.Series, rows: pd.Series, device: torch.device) -> None:
        codes, names = pd.factorize(shards)
        places = rows.to_numpy(np.int32)
        fewest = np.zeros(len(names), dtype=np.int64)
        np.maximum.at(fewest, codes, places + 1)
        first = load_shard(folders[0] / names[0])
        self.device = device
        self.shapes, self._dtypes = _form(first)
        paths = [folder / name for folder in folders for name in names]
        opened = [self._open(path, rows) for path, rows in zip(paths, np.tile(fewest, len(folders)), strict=True)]
        self._shards = np.concatenate([codes + len(names) * number for number in range(len(folders))], dtype=np.int32)
        self._places = np.tile(places, len(folders))
        self._flat = {
            name: [shard[name].flatten(1).numpy() for shard in opened] for name in first if not _is_ragged(name, first)
        }
        self._ragged: dict[str, _RaggedRows] = {}
        for name in ragged_names(first):
            lengths = [ragged_lengths(shard, name).numpy() for shard in opened]
            at = np.cumsum([0, *map(len, lengths[:-1])])[self._shards] + self._places
            ends = np.concatenate([shard[name + ENDS].numpy() for shard in opened])[at]
            items = [shard[name].flatten(1).numpy() for shard in opened]
            self._ragged[name] = _RaggedRows(items, self.shapes[name], ends, np.concatenate(lengths)[at])
        self._measure()

    def _open(self, path: Path, rows: int) -> Tensors:
        tensors = load_shard(path)
        if _form(tensors) != (self.shapes, self._dtypes) or min(map(len, tensors.values())) < rows:
            raise DamagedShardError(f"{path} is not the shard that its index tells of; delete it and run `dvc repro`")
        return tensors

    def _measure(self) -> None:
        """Keep in `shapes` what `gather` gives."""
        self.shapes = {name: self.shapes[name] for name in self._flat} | {
            name: (rows.longest, *rows.item_shape) for name, rows in self._ragged.items()
        }

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """The bytes that all rows take."""
        items = {name: len(self) * math.prod(self.shapes[name]) for name in self._flat}
        items |= {name: int(rows.lengths.sum()) * math.prod(rows.item_shape) for name, rows in self._ragged.items()}
        return sum(count * self._dtypes[name].itemsize for name, count in items.items())

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for, copied to the device."""
        chosen = rows if isinstance(rows, slice) else rows.cpu().numpy()
        gathered = self._of_one_length(chosen)
        for name, ragged in self._ragged.items():
            host = self._host(name, len(self._places[chosen])).zero_()
            padded = host.flatten(2).numpy()
            for number, own in enumerate(ragged.rows(self._shards, chosen)):
                padded[number, : len(own)] = own
            mask = torch.from_numpy(np.arange(ragged.longest) < ragged.lengths[chosen][:, None])
            gathered |= {name: host.to(self.device, non_blocking=True), name + MASK: mask.to(self.device)}
        return gathered

    def select(self, rows: np.ndarray) -> "StreamedRows":
        """These rows alone."""
        selected = copy(self)
        selected._shards, selected._places = self._shards[rows], self._places[rows]
        selected._ragged = {
            name: replace(own, ends=own.ends[rows], lengths=own.lengths[rows]) for name, own in self._ragged.items()
        }
        selected._measure()
        return selected

    def load(self) -> InMemoryRows:
        """All rows on the device, read in the order in which they are stored; those of different lengths in theirs."""
        loaded = {
            name: torch.empty((len(self), *self.shapes[name]), dtype=self._dtypes[name], device=self.device)
            for name in self._flat
        }
        for rows in torch.from_numpy(np.lexsort((self._places, self._shards))).split(ROWS_AT_ONCE):
            for name, tensor in self._of_one_length(rows.numpy()).items():
                loaded[name][rows.to(self.device)] = tensor
        for name, ragged in self._ragged.items():
            ends = torch.from_numpy(ragged.lengths.cumsum())
            size = int(ragged.lengths.sum())
            items = torch.empty((size, *ragged.item_shape), dtype=self._dtypes[name], device=self.device)
            for start in range(0, len(self), ROWS_AT_ONCE):
                rows = np.concatenate(ragged.rows(self._shards, slice(start, start + ROWS_AT_ONCE)))
                first = int(ends[start - 1]) if start else 0
                items[first : first + len(rows)] = torch.from_numpy(rows).view(-1, *ragged.item_shape)
            loaded |= {name: items, name + ENDS: ends.to(self.device)}
        return InMemoryRows(loaded)

    def _of_one_length(self, chosen: np.ndarray | slice) -> Tensors:
        shards, places = self._shards[chosen].tolist(), self._places[chosen].tolist()
        return {
            name: self._copied(name, [flat[shard][place] for shard, place in zip(shards, places, strict=True)])
            for name, flat in self._flat.items()
        }

    def _copied(self, name: str, rows: Sequence[np.ndarray]) -> torch.Tensor:
        host = self._host(name, len(rows))
        if rows:
            np.concatenate(rows, out=host.view(-1).numpy())
        return host.to(self.device, non_blocking=True)

    def _host(self, name: str, rows: int) -> torch.Tensor:
        # From pinned memory the copy to a GPU is asynchronous; torch reuses that memory only when the copy is done.
        shape = (rows, *self.shapes[name])
        return torch.empty(shape, dtype=self._dtypes[name], pin_memory=self.device.type == "cuda")


RowSource = InMemoryRows | StreamedRows


@dataclass(frozen=True)
class _RaggedRows:
    """Rows of different lengths in their shards: the items of each shard, and where the items of each row end there."""

    items: list[np.ndarray]
    item_shape: tuple[int, ...]
    ends: np.ndarray
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))

    def rows(self, shards: np.ndarray, chosen: np.ndarray | slice) -> list[np.ndarray]:
        """The items (length, ...), flattened, of each of the rows ``chosen``."""
        ends, lengths = self.ends[chosen].tolist(), self.lengths[chosen].tolist()
        return [
            self.items[shard][end - length : end]
            for shard, end, length in zip(shards[chosen].tolist(), ends, lengths, strict=True)
        ]


def _is_ragged(name: str, tensors: Tensors) -> bool:
    """Whether a tensor holds rows of different lengths, or says where such rows end."""
    return name + ENDS in tensors or name.removesuffix(ENDS) in ragged_names(tensors)


def _form(tensors: Tensors) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """The shape of one row of each tensor, or of an item of one; and its dtype."""
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    return shapes, {name: tensor.dtype for name, tensor in tensors.items()}
