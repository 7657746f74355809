"""Where the rows of a cache are while a training reads them: on its device, or still on the disk.

    NNNNN.safetensors shards, fp16  ->  StreamedRows: mapped from the disk; a batch is copied to the device
                                        InMemoryRows: all of them on the device; a batch is an index there

Both give the same bytes for the same rows, raw as they are stored, so where the rows are never changes a result.
"""

import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from latentloom.encoding.shard_files import DamagedShardError, Tensors, load_shard

ROWS_AT_ONCE = 4096

Rows = torch.Tensor | slice  # numbers of rows (B,), int64, on any device; or a range of them


class InMemoryRows:
    """Rows of tensors (N, ...) on one device, such as ``mean`` and ``std`` of latents.

    Attributes:
        device: where `gather` puts rows.
        streamed: whether rows stay on the disk until a batch asks for them.
        shapes: the shape of one row of each tensor.
    """

    streamed = False

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self.device = next(iter(tensors.values())).device
        self.shapes, _ = _form(tensors)

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for; never waits for the device."""
        return {name: tensor[rows] for name, tensor in self._tensors.items()}


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
        self._flat = {name: [shard[name].flatten(1).numpy() for shard in opened] for name in first}
        self._shards = np.concatenate([codes + len(names) * number for number in range(len(folders))], dtype=np.int32)
        self._places = np.tile(places, len(folders))

    def _open(self, path: Path, rows: int) -> Tensors:
        tensors = load_shard(path)
        if _form(tensors) != (self.shapes, self._dtypes) or min(map(len, tensors.values())) < rows:
            raise DamagedShardError(f"{path} is not the shard that its index tells of; delete it and run `dvc repro`")
        return tensors

    def __len__(self) -> int:
        return len(self._places)

    @property
    def nbytes(self) -> int:
        """The bytes that all rows take."""
        return len(self) * sum(math.prod(self.shapes[name]) * dtype.itemsize for name, dtype in self._dtypes.items())

    def gather(self, rows: Rows) -> Tensors:
        """The rows (B, ...) of every tensor, in the order asked for, copied to the device."""
        chosen = rows if isinstance(rows, slice) else rows.cpu().numpy()
        shards, places = self._shards[chosen].tolist(), self._places[chosen].tolist()
        return {
            name: self._copied(name, [flat[shard][place] for shard, place in zip(shards, places, strict=True)])
            for name, flat in self._flat.items()
        }

    def select(self, rows: np.ndarray) -> "StreamedRows":
        """These rows alone."""
        selected = copy(self)
        selected._shards, selected._places = self._shards[rows], self._places[rows]
        return selected

    def load(self) -> InMemoryRows:
        """All rows on the device, read in the order in which they are stored."""
        loaded = {
            name: torch.empty((len(self), *self.shapes[name]), dtype=dtype, device=self.device)
            for name, dtype in self._dtypes.items()
        }
        for rows in torch.from_numpy(np.lexsort((self._places, self._shards))).split(ROWS_AT_ONCE):
            for name, tensor in self.gather(rows).items():
                loaded[name][rows.to(self.device)] = tensor
        return InMemoryRows(loaded)

    def _copied(self, name: str, rows: Sequence[np.ndarray]) -> torch.Tensor:
        # From pinned memory the copy to a GPU is asynchronous; torch reuses that memory only when the copy is done.
        host = torch.empty(
            (len(rows), *self.shapes[name]), dtype=self._dtypes[name], pin_memory=self.device.type == "cuda"
        )
        if rows:
            np.concatenate(rows, out=host.view(-1).numpy())
        return host.to(self.device, non_blocking=True)


RowSource = InMemoryRows | StreamedRows


def _form(tensors: Tensors) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """The shape of one row of each tensor, and its dtype."""
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    return shapes, {name: tensor.dtype for name, tensor in tensors.items()}
