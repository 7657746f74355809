"""The content-keyed cache: rows of tensors, such as latents and embeddings, that are computed once per content.

A *key* is a hash of everything that decides a row's bytes: the image or the caption, the encoder's weights, the
preprocessing, the dtypes. Equal keys mean equal bytes, so nothing is ever invalidated: what changed has another key.

A *shard* is a safetensors file of consecutive rows. Its header lists their keys and a checksum, and the same rows give
the same bytes. The rows' own ids decide where a shard ends (`latentloom.sharding`), so one added row changes one shard.

The *store* (`latentloom.encoding.row_store`) holds the finished shards of all earlier runs on this machine. It only
saves work: it may be deleted at any time, also while a stage runs.

A stage gets its rows in three steps:

    plan = Plan(store, out, ids, keys, ...)    where shards end; which of them, and which rows of the others, are stored
    for part in plan.run(function): ...        the work is cut into tasks: consecutive shards, wherever they are made

        def function(task):
            missing = task.link()              link every shard that is stored; the rows that no one has computed
            batches = ...                      compute those, in full batches across the task's shards
            for shard in task.write(batches)   assemble the other shards from rows that are stored or computed

Rows are numbers and keys are bytes: a plan holds some hundred bytes per row and no object. A finished shard enters the
store at once, so a killed stage loses at most the shards that it was working on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from latentloom import sharding
from latentloom.encoding.row_store import HEADER, RowStore, checksum, keep, link_stored, shard_name, stored_rows
from latentloom.encoding.shard_files import ENDS, SHARDS, Tensors, load_shard, ragged, ragged_names
from latentloom.engine import here, ordered_map
from latentloom.files import write_bytes
from latentloom.ids import ID_BYTES, to_hex

FORMAT_VERSION = 2

# A task is as small as it may be: its last batch is filled up, which must cost little beside the others; and what it
# has under way is lost when it is killed.
TASK_MISSING = 512  # rows to compute, at the fewest
TASK_ROWS = 2**14  # and no more shards once it has so many rows

Row = tuple[Tensors, int]  # the tensors that hold it, and its number there


def row_keys(ids: np.ndarray, *parts: str) -> np.ndarray:
    """The keys of rows, uint8 (N, 32): hashes of everything that decides a row's content.

    Args:
        ids: of what each row is made, uint8 (N, 32).
        parts: what decides the content beside it, alike for all rows.
    """
    rest = "|".join(["", *parts, f"v{FORMAT_VERSION}"]).encode()
    keys = np.empty((len(ids), ID_BYTES), np.uint8)
    for start in range(0, len(ids), 2**16):
        digits = ids[start : start + 2**16].tobytes().hex().encode()
        places = range(0, len(digits), 2 * ID_BYTES)
        hashes = b"".join(hashlib.sha256(digits[at : at + 2 * ID_BYTES] + rest).digest() for at in places)
        keys[start : start + len(places)] = np.frombuffer(hashes, np.uint8).reshape(-1, ID_BYTES)
    return keys


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file, which rows of its task it holds, and its tensors (rows, ...)."""

    path: Path
    rows: slice
    tensors: Tensors

    @property
    def number(self) -> int:
        return int(self.path.stem)


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


class Planned(NamedTuple):
    """A shard of a task: its file, its file in the store, its rows in the task, and whether the store has it."""

    path: Path
    stored: Path
    rows: slice
    is_stored: bool


@dataclass
class Task:
    """Consecutive shards of a plan, and where their rows come from: the unit of work, which is picklable.

    Attributes:
        shards: of the task.
        keys: of its rows, uint8 (n, 32).
        made_of: what its rows are made of, or where that is; sliced out of what the plan was given.
        planned: how many of its rows have to be computed, unless the store turns out to be damaged.
        computed: how many were.
        inputs: the files that are read for those.
    """

    shards: list[Planned]
    keys: np.ndarray
    made_of: Any
    planned: int
    inputs: Sequence[Path]
    sources: dict[int, Path]  # shards of the store, by number
    source: np.ndarray  # which of them holds a row (n,), -1: none
    row: np.ndarray  # its number there (n,)
    computed: int = 0
    tick: Callable[[int], Any] | None = None  # told of computed rows; not in another process
    _linked: set[Path] = field(default_factory=set)
    _found: dict[int, Tensors] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tick": None}

    def __str__(self) -> str:
        first, last = self.shards[0].path, self.shards[-1].path
        return f"{first}" if first == last else f"{first} to {last.name}"

    @property
    def reads(self) -> list[Path]:
        stored = [shard.stored for shard in self.shards if shard.is_stored]
        return [*self.inputs, *stored, *self.sources.values()]

    @property
    def writes(self) -> list[Path]:
        return [shard.path for shard in self.shards]

    def link(self) -> np.ndarray:
        """Put every shard that the store has at its place; give the rows that have to be computed, ascending.

        Each stored shard is compared with its checksum. One that is damaged, or gone by now, has its rows computed.
        """
        is_open = np.zeros(len(self.keys), bool)
        for shard in self.shards:
            if shard.is_stored and link_stored(here(shard.stored), shard.stored.stem, here(shard.path)):
                self._linked.add(shard.path)
            else:
                is_open[shard.rows] = True
        for number, path in self.sources.items():
            own = np.flatnonzero(self.source == number)
            found = stored_rows(here(path), path.stem)
            if found and np.array_equal(found.keys[self.row[own].clip(max=len(found.keys) - 1)], self.keys[own]):
                self._found[number] = found.tensors
            else:
                self.source[own] = -1
        missing = np.flatnonzero(is_open & (self.source < 0))
        self._tell(self.planned - len(missing))
        return missing

    def write(self, batches: Iterable[Tensors]) -> Iterator[Shard]:
        """Write the shards that were not linked.

        Args:
            batches: the rows that `link` gave, in order, in batches of any size, as a shard's tensors; the first of
                them is (rows, ...).

        Yields:
            Every shard in order, once its file is complete under its final name.

        Raises:
            WriteError: when the disk is full, naming the file; the shards before it are kept.
        """
        computed = self._rows(batches)
        for shard in self.shards:
            path = here(shard.path)
            if shard.path not in self._linked:
                places = zip(self.source[shard.rows].tolist(), self.row[shard.rows].tolist(), strict=True)
                rows = [next(computed) if source < 0 else (self._found[source], row) for source, row in places]
                save_shard(path, _stack(rows), to_hex(self.keys[shard.rows]).to_pylist())
                if path == shard.path:  # else the driver does, which sees the store
                    keep(path, shard.stored)
            yield Shard(shard.path, shard.rows, load_shard(path))
        self._found.clear()

    def _rows(self, batches: Iterable[Tensors]) -> Iterator[Row]:
        for batch in batches:
            size = len(next(iter(batch.values())))
            self.computed += size
            self._tell(size)
            for row in range(size):
                yield batch, row

    def _tell(self, rows: int) -> None:
        if self.tick is not None:
            self.tick(rows)


class Done(NamedTuple):
    """What a function gives for a task: how many rows it computed, and what the stage wants to know of its shards."""

    computed: int
    value: Any


class Plan:
    """Where the rows of a cache come from.

    Args:
        store: the shards of earlier runs.
        out: the folder for ``00000.safetensors`` and so on.
        ids: what each row is of, as a hash, uint8 (N, 32); they decide where shards end, with
        row_bytes: of every row, or of each one (N,), about; so that this depends on no encoder's weights.
        keys: uint8 (N, 32).
        made_of: (N, ...), of which each task is given its rows' part.
        groups: one per row (N,), such as the size of its image; rows of two groups never share a shard.
        inputs: the files that hold what some part of ``made_of`` names.

    Attributes:
        keys: as they were given.
        missing: whether each row has to be computed (N,), unless the store turns out to be damaged.
        computed: how many rows were, up to now.
    """

    def __init__(
        self,
        store: RowStore,
        out: Path,
        ids: np.ndarray,
        keys: np.ndarray,
        row_bytes: int | np.ndarray,
        made_of: Any,
        *,
        groups: np.ndarray | None = None,
        inputs: Callable[[Any], Sequence[Path]] | None = None,
    ) -> None:
        self._store, self._out, self.keys, self._made_of, self._inputs = store, out, keys, made_of, inputs
        self._ranges = sharding.shard_ranges(ids, row_bytes, sharding.TENSORS, groups)
        self._names = [shard_name(keys[rows.start : rows.stop]) for rows in self._ranges]
        there = store.names()
        self.missing = np.ones(len(keys), bool)
        for name, rows in zip(self._names, self._ranges, strict=True):
            self.missing[rows.start : rows.stop] = name not in there
        self._source, self._row = np.full((2, len(keys)), -1, np.int32)
        wanted = np.flatnonzero(self.missing)
        self._sources, self._source[wanted], self._row[wanted] = store.find(keys[wanted])
        self._there, self.computed = there, 0
        self.missing[self._source >= 0] = False

    def tasks(self) -> Iterator[Task]:
        """The tasks, in the order of their shards."""
        start = 0
        for number, rows in enumerate(self._ranges):
            missing = np.count_nonzero(self.missing[self._ranges[start].start : rows.stop])
            is_last = number + 1 == len(self._ranges)
            if missing >= TASK_MISSING or rows.stop - self._ranges[start].start >= TASK_ROWS or is_last:
                yield self._task(start, number + 1)
                start = number + 1

    def run(
        self,
        function: Callable[..., Done],
        *,
        encoder: Any = None,
        title: str = "",
        unit: str = "row",
    ) -> Iterator[Any]:
        """Have ``function`` make the shards of every task; other shards in the folder are deleted at the end.

        Args:
            function: of a task; with ``encoder``, of this and a task, and picklable.
            encoder: goes to each worker, picklable; without it, all is done here.
            title, unit: of the progress bar; what a row is of.

        Yields:
            What the function gave for each task, in order.
        """
        self._out.mkdir(parents=True, exist_ok=True)
        tasks, known = list(self.tasks()), len(self.keys) - np.count_nonzero(self.missing)
        with tqdm(total=len(self.keys), initial=known, desc=title, unit=unit) as progress:
            for task in tasks:
                task.tick = progress.update
            setup = partial(_itself, encoder)
            results = map(function, tasks) if encoder is None else ordered_map(function, tasks, setup=setup)
            for task, done in zip(tasks, results, strict=True):
                for shard in task.shards:
                    self._store.add(shard.path, shard.stored)
                self.computed += done.computed
                known += task.planned
                progress.update(known - progress.n)  # of what another process has computed
                yield done.value
        written = {self._path(number) for number in range(len(self._ranges))}
        for path in [*self._out.glob(SHARDS), *self._out.glob(".*.tmp")]:
            if path not in written:
                path.unlink()

    def _task(self, start: int, stop: int) -> Task:
        first, rows = self._ranges[start].start, slice(self._ranges[start].start, self._ranges[stop - 1].stop)
        shards = []
        for number in range(start, stop):
            own, name = self._ranges[number], self._names[number]
            places = slice(own.start - first, own.stop - first)
            shards.append(Planned(self._path(number), self._store.path(name), places, name in self._there))
        source, missing, made_of = self._source[rows].copy(), self.missing[rows], self._made_of[rows]
        used = {int(number): self._sources[number] for number in np.unique(source) if number >= 0}
        return Task(
            shards,
            self.keys[rows],
            made_of,
            planned=np.count_nonzero(missing),
            inputs=self._inputs(made_of[missing]) if self._inputs and missing.any() else (),
            sources=used,
            source=source,
            row=self._row[rows],
        )

    def _path(self, number: int) -> Path:
        return self._out / f"{number:05d}.safetensors"


def _itself(encoder: Any) -> Any:
    return encoder


def save_shard(path: Path, tensors: Tensors, keys: Sequence[str]) -> None:
    """Write one shard atomically.

    Raises:
        WriteError: naming the file and the room it needs, when the disk is full.
    """
    write_bytes(path, save(tensors, {HEADER: json.dumps({"checksum": checksum(tensors), "keys": list(keys)})}))


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
