import hashlib
import itertools

import numpy as np
import pytest

from latentloom.ids import from_hex
from latentloom.sharding import ShardBytes, ends_shard, shard_ranges

SIZE = ShardBytes(fewest=512, typical=512, most=2048)


def ids(count: int, name: str = "row") -> list[str]:
    return [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(count)]


def shards(row_ids: list[str]) -> list[tuple[str, ...]]:
    parts = shard_ranges(from_hex(row_ids), 1, SIZE)
    return [tuple(row_ids[position] for position in part) for part in parts]


@pytest.mark.parametrize("row_bytes", [1, 7, 100])
def test_shards_hold_every_row_once_in_order_and_keep_their_bounds(row_bytes):
    row_ids = from_hex(ids(20_000))
    parts = shard_ranges(row_ids, row_bytes, SIZE)
    assert list(itertools.chain(*parts)) == list(range(20_000))
    sizes = [row_bytes * len(part) for part in parts[:-1]]
    assert all(SIZE.fewest <= size < SIZE.most + row_bytes for size in sizes)
    assert np.mean(sizes) == pytest.approx(1024 - 70, abs=90)  # the most cuts off some


def test_a_shard_never_outgrows_the_most_bytes_whatever_the_ids():
    same = np.full((3 * SIZE.most + 1, 32), 255, np.uint8)
    assert [len(part) for part in shard_ranges(same, 1, SIZE)] == [SIZE.most] * 3 + [1]
    assert [len(part) for part in shard_ranges(same[:3], 5000, SIZE)] == [1, 1, 1]


def test_rows_put_in_anywhere_change_only_the_shards_around_them():
    row_ids = ids(50_000)
    before = set(shards(row_ids))
    for place in (0, 10_000, 33_333):
        after = shards(row_ids[:place] + ids(37, "new") + row_ids[place:])
        assert len([part for part in after if part not in before]) <= 4


def test_rows_put_in_at_the_end_leave_all_but_the_last_shard():
    row_ids = ids(10_000)
    before = shards(row_ids)
    assert shards(row_ids + ids(5_000, "new"))[: len(before) - 1] == before[:-1]


def test_row_by_row_the_same_shards_come_out():
    """Of rows of all sizes, and of several groups."""
    row_ids, row_bytes = ids(10_000), np.random.default_rng(0).integers(1, 60, 10_000)
    groups = np.repeat([0, 1, 2, 1], [3000, 1, 2000, 4999])
    lengths, rows, size = [], 0, 0
    for number, row_id in enumerate(row_ids):
        rows, size = rows + 1, size + int(row_bytes[number])
        is_last = number + 1 == len(row_ids) or groups[number] != groups[number + 1]
        if is_last or ends_shard(row_id, int(row_bytes[number]), size, SIZE):
            lengths.append(rows)
            rows = size = 0
    assert lengths == [len(part) for part in shard_ranges(from_hex(row_ids), row_bytes, SIZE, groups)]


def test_no_rows_are_no_shards():
    assert shard_ranges(from_hex([]), 1, SIZE) == []
