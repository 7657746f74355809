"""Where the rows of a cache are while a training reads them: on its device, or still on the disk.

    NNNNN.safetensors shards, fp16  ->  StreamedRows: on the disk; many rows are read at once, in the order of storage
                                        ReadRows:     such rows in the host's memory; a batch is copied to the device
                                        InMemoryRows: all of them on the device; a batch is an index there

All give the same bytes for the same rows, raw as they are stored, so where the rows are never changes a result.

Rows of different lengths, such as the token states of captions, are padded with zeros to the longest of all, so that
batches have one shape: NAME (B, longest, ...) comes with NAME_mask (B, longest), which says what is no padding.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latentloom.encoding.shard_files import ENDS, Tensors, ragged_names
from latentloom.encoding.shard_reader import READERS, ShardReader

ROWS_AT_ONCE = 8192
MASK = "_mask"
READ_ALONE = 4 * 2**20  # bytes; fewer are not worth threads

Rows = torch.Tensor | slice  # numbers of rows (B,), int64, on any device; or a range of them


class InMemoryRows:
    """Rows of tensors (N, ...) on one device, such as ``mean`` and ``std`` of latents, in the form of one shard.

    Args:
        tensors: on the device.
        lengths: of the rows of each ragged tensor, where they are not one after the other.
        shapes: as the attribute, where rows are to be padded to more than the longest of these.

    Attributes:
        device: where `gather` puts rows.
        streamed: whether rows stay on the disk until a batch asks for them.
        shapes: the shape of one row of each tensor, of the longest one where lengths differ.
    """

    streamed = False

    def __init__(
        self,
        tensors: Tensors,
        *,
        lengths: Tensors | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._tensors = {name: tensor for name, tensor in tensors.items() if not _is_ragged(name, tensors)}
        self.device = next(iter(tensors.values())).device
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in self._tensors.items()}
        self._ragged = {}
        for name in ragged_names(tensors):
            items, ends = tensors[name], tensors[name + ENDS]
            own = lengths[name] if lengths else ends.diff(prepend=ends.new_zeros(1))
            self._ragged[name] = (items, ends - own, own)
            self.shapes[name] = (int(own.max()) if len(own) else 0, *items.shape[1:])
        self.shapes |= shapes or {}

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for; never waits for the device."""
        if isinstance(rows, slice):
            gathered = {name: tensor[rows] for name, tensor in self._tensors.items()}
        else:
            rows = rows.to(self.device, non_blocking=True)
            gathered = {name: tensor.index_select(0, rows) for name, tensor in self._tensors.items()}
        for name, (items, starts, lengths) in self._ragged.items():
            steps = torch.arange(self.shapes[name][0], device=self.device)
            mask = steps < lengths[rows].unsqueeze(1)
            padded = items[torch.where(mask, starts[rows].unsqueeze(1) + steps, 0)]
            padded.masked_fill_(~mask.reshape(*mask.shape, *[1] * (padded.ndim - 2)), 0)
            gathered |= {name: padded, name + MASK: mask}
        return gathered


class ReadRows:
    """Some rows of a `StreamedRows`, by the numbers that they have there, in the memory of the host.

    Args:
        numbers: of the rows (N,), in the order of ``rows``.
        rows: on the host.
        device: where `gather` puts rows.
    """

    streamed = True

    def __init__(self, numbers: np.ndarray, rows: InMemoryRows, device: torch.device) -> None:
        self._places = np.argsort(numbers)
        self._numbers, self._rows = numbers[self._places], rows
        self.device, self.shapes = device, rows.shapes

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for, copied to the device."""
        at = self._places[np.searchsorted(self._numbers, rows.cpu().numpy())]
        return {name: self._copied(tensor) for name, tensor in self._rows.gather(torch.from_numpy(at)).items()}

    def _copied(self, host: torch.Tensor) -> torch.Tensor:
        # From pinned memory the copy to a GPU is asynchronous; torch reuses that memory only when the copy is done.
        if self.device.type == "cuda":
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)


class StreamedRows:
    """Rows that stay in their shards; the same attributes as `InMemoryRows`.

    Args:
        folders: each has the same shards; the rows of the second follow those of the first, and so on.
        names: the file names of shards.
        shards: for each row (N,), which of ``names`` its shard is.
        places: for each row (N,), its place in that shard.
        device: where `gather` puts rows.

    Raises:
        DamagedShardError: when a shard is missing or damaged, naming it.
    """

    streamed = True

    def __init__(
        self,
        folders: Sequence[Path],
        names: Sequence[str],
        shards: np.ndarray,
        places: np.ndarray,
        device: torch.device,
    ) -> None:
        fewest = np.zeros(len(names), np.int64)
        np.maximum.at(fewest, shards, places + 1)
        used = np.flatnonzero(fewest)
        self._files = ShardReader([folder / names[number] for folder in folders for number in used])
        self._files.check_rows(np.tile(fewest[used], len(folders)))
        self.device, self._views = device, len(folders)
        own = (np.cumsum(fewest > 0, dtype=np.int32) - 1)[shards]
        self._shards = np.concatenate([own + np.int32(len(used) * view) for view in range(len(folders))])
        self._places = np.tile(places.astype(np.int32, copy=False), len(folders))
        self._ragged = {name: self._measured(name) for name in self._files.ragged}
        self._shape()

    def _measured(self, name: str) -> "_RaggedRows":
        ends = self._files.ends(name)
        lengths = [np.diff(own, prepend=0).astype(np.int32) for own in ends]
        at = np.cumsum([0, *map(len, ends[:-1])])[self._shards] + self._places
        return _RaggedRows(np.concatenate(ends)[at].astype(np.int32), np.concatenate(lengths)[at])

    def _shape(self) -> None:
        """Keep in `shapes` what `gather` gives."""
        self.shapes = {
            name: (self._ragged[name].longest, *stored.shape[1:]) if name in self._ragged else stored.shape[1:]
            for name, stored in self._files.layout.items()
            if not name.endswith(ENDS)
        }

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """The bytes that all rows take."""
        items = {name: rows.lengths.sum(dtype=np.int64) for name, rows in self._ragged.items()}
        return int(sum(items.get(name, len(self)) * self._files.bytes_of(name) for name in self.shapes))

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for, copied to the device."""
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        return self.read(rows).gather(rows)

    def read(self, rows: torch.Tensor) -> ReadRows:
        """These rows, in any order, into the memory of the host, each once.

        Raises:
            DamagedShardError: when a shard was deleted or replaced since this was made, naming it.
        """
        numbers = np.unique(rows.cpu().numpy())
        numbers = numbers[np.lexsort((self._places[numbers], self._shards[numbers]))]
        tensors = self._read(numbers)
        tensors |= {
            name + ENDS: torch.from_numpy(own.lengths[numbers].cumsum(dtype=np.int64))
            for name, own in self._ragged.items()
        }
        return ReadRows(numbers, InMemoryRows(tensors, shapes=self.shapes), self.device)

    def select(self, rows: slice) -> "StreamedRows":
        """These rows of each folder alone."""

        def own(column: np.ndarray) -> np.ndarray:
            return column.reshape(self._views, -1)[:, rows].reshape(-1)

        selected = copy(self)
        selected._shards, selected._places = own(self._shards), own(self._places)
        selected._ragged = {
            name: _RaggedRows(own(column.ends), own(column.lengths)) for name, column in self._ragged.items()
        }
        selected._shape()
        return selected

    def storage_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first folder's rows as they are stored, shard by shard, int32; and where each shard's rows end there."""
        rows = len(self) // self._views
        order = np.lexsort((self._places[:rows], self._shards[:rows])).astype(np.int32)
        counts = np.bincount(self._shards[:rows])
        return torch.from_numpy(order), torch.from_numpy(counts[counts > 0].cumsum())

    def load(self) -> InMemoryRows:
        """All rows on the device, read in the order in which they are stored."""
        order = np.lexsort((self._places, self._shards))
        loaded: Tensors = {}
        for name, shape in self.shapes.items():
            own = self._ragged.get(name)
            size = (int(own.lengths.sum(dtype=np.int64)), *shape[1:]) if own else (len(self), *shape)
            loaded[name] = torch.empty(size, dtype=self._files.layout[name].dtype, device=self.device)
        firsts = dict.fromkeys(self._ragged, 0)
        for rows in np.split(order, range(ROWS_AT_ONCE, len(order), ROWS_AT_ONCE)):
            for name, tensor in self._read(rows).items():
                if name in firsts:
                    loaded[name][firsts[name] : firsts[name] + len(tensor)] = tensor
                    firsts[name] += len(tensor)
                else:
                    loaded[name][torch.from_numpy(rows).to(self.device)] = tensor.to(self.device)
        lengths = {}
        for name, own in self._ragged.items():
            ends = np.empty(len(self), np.int64)
            ends[order] = own.lengths[order].cumsum(dtype=np.int64)
            loaded[name + ENDS] = torch.from_numpy(ends).to(self.device)
            lengths[name] = torch.from_numpy(own.lengths.astype(np.int64)).to(self.device)
        return InMemoryRows(loaded, lengths=lengths)

    def _read(self, rows: np.ndarray) -> Tensors:
        """Rows that are in the order of storage, on the host; of those of different lengths, their items."""
        shards, places = self._shards[rows], dict.fromkeys(self.shapes, self._places[rows])
        firsts = np.flatnonzero(np.diff(shards, prepend=-1))
        edges = dict.fromkeys(self.shapes, np.append(firsts, len(rows)))
        for name, own in self._ragged.items():
            starts = np.concatenate([[0], own.lengths[rows].cumsum(dtype=np.int64)])
            first = own.ends[rows] - own.lengths[rows] - starts[:-1]
            places[name] = np.repeat(first, own.lengths[rows]) + np.arange(starts[-1])
            edges[name] = starts[edges[name]]
        host = {
            name: torch.empty((len(places[name]), *stored.shape[1:]), dtype=stored.dtype)
            for name, stored in self._files.layout.items()
            if name in places
        }
        content = {name: tensor.view(-1).view(torch.uint8).numpy() for name, tensor in host.items()}

        def read_one(number: int) -> None:
            parts = {}
            for name, own in places.items():
                part, size = slice(*edges[name][number : number + 2]), self._files.bytes_of(name)
                parts[name] = own[part], content[name][part.start * size : part.stop * size]
            self._files.read(shards[firsts[number]], parts)

        if sum(tensor.nbytes for tensor in host.values()) < READ_ALONE:
            for number in range(len(firsts)):
                read_one(number)
        else:
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(read_one, range(len(firsts))))
        return host


RowSource = InMemoryRows | StreamedRows | ReadRows


@dataclass(frozen=True)
class _RaggedRows:
    """Rows of different lengths: how many items each has, and where they end in its shard."""

    ends: np.ndarray
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))


def _is_ragged(name: str, tensors: Mapping[str, object]) -> bool:
    """Whether a tensor holds rows of different lengths, or says where such rows end."""
    return name + ENDS in tensors or name.removesuffix(ENDS) in ragged_names(tensors)
