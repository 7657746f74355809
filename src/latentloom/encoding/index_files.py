"""The tables of a cache, written part by part in row groups: any number of rows is written and read in parts."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentloom.files import atomic_path

ROW_GROUP = 2**17  # rows
STRING = pa.large_string()


def write_table(path: Path, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write a table atomically, given in parts of any size; the same rows give the same bytes.

    Raises:
        WriteError: when the disk is full, naming the file.
    """
    waiting = schema.empty_table()
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in parts:
            waiting = pa.concat_tables([waiting, part])
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting[:ROW_GROUP])
                waiting = waiting[ROW_GROUP:]
        if len(waiting):
            writer.write_table(waiting)


def shard_names(numbers: pa.Array) -> pa.Array:
    """The names of shards by their numbers: ``00000.safetensors`` and so on."""
    digits = pc.utf8_lpad(numbers.cast(pa.string()), 5, "0")
    return pc.binary_join_element_wise(digits, ".safetensors", "")
