import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentloom.encoding import index_files
from latentloom.encoding.index_files import shard_names, write_table
from latentloom.files import iterate_table

SCHEMA = pa.schema([("number", pa.int32())])


def table(rows: range) -> pa.Table:
    return pa.table({"number": pa.array(rows, pa.int32())})


@pytest.mark.parametrize("parts", [[25], [1] * 25, [9, 0, 16], []])
def test_rows_are_written_in_the_same_groups_whatever_the_parts(tmp_path, monkeypatch, parts):
    monkeypatch.setattr(index_files, "ROW_GROUP", 10)
    rows = sum(parts)
    write_table(
        tmp_path / "table.parquet",
        SCHEMA,
        (table(range(rows)).slice(sum(parts[:n]), own) for n, own in enumerate(parts)),
    )
    file = pq.ParquetFile(tmp_path / "table.parquet")
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    assert groups == ([10, 10, 5] if parts else [])
    assert file.read().equals(table(range(rows)))


def test_a_table_read_in_parts_is_never_whole_in_memory(tmp_path):
    ids = [random.Random(row).randbytes(32).hex() for row in range(40_000)]
    pq.write_table(pa.table({"id": ids}), tmp_path / "table.parquet", row_group_size=2000)
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for part in iterate_table(tmp_path / "table.parquet", ["id"]):
        rows += len(part)
        most = max(most, pa.total_allocated_bytes() - before)
    assert rows == len(ids) and 0 < most < 64 * len(ids) / 2


def test_shards_are_named_by_at_least_five_digits():
    names = shard_names(pa.array([0, 12, 99_999, 123_456])).to_pylist()
    assert names == [f"{number:05d}.safetensors" for number in (0, 12, 99_999, 123_456)]
