import hashlib
import itertools

from latentloom.sharding import FEWEST_ROWS, MOST_ROWS, ends_shard, shard_ranges


def ids(count: int, name: str = "row") -> list[str]:
    return [hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(count)]


def shards(row_ids: list[str]) -> list[tuple[str, ...]]:
    return [tuple(row_ids[position] for position in part) for part in shard_ranges(row_ids)]


def test_shards_hold_every_row_once_in_order_and_keep_their_bounds():
    row_ids = ids(20_000)
    parts = shards(row_ids)
    assert list(itertools.chain(*parts)) == row_ids
    assert all(FEWEST_ROWS <= len(part) <= MOST_ROWS for part in parts[:-1])
    assert 900 < len(row_ids) / len(parts) < 1150


def test_a_shard_never_outgrows_the_most_rows_whatever_the_ids():
    same = ["1" * 64] * (3 * MOST_ROWS + 1)
    assert [len(part) for part in shards(same)] == [MOST_ROWS] * 3 + [1]


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
    sizes, rows = [], 0
    row_ids = ids(10_000)
    for row_id in row_ids:
        rows += 1
        if ends_shard(row_id, rows):
            sizes.append(rows)
            rows = 0
    assert [*sizes, rows] == [len(part) for part in shard_ranges(row_ids)]


def test_no_rows_are_no_shards():
    assert shard_ranges([]) == []
