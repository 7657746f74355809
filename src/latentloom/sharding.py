"""Where one shard ends and the next begins: decided by the rows' own ids and bytes, not by their positions.

Cut at fixed positions, shards would all change when one row is added or removed early in the list. Cut where a row's
id says so, only the shards around the change do, and DVC stores and pushes no more than those (content-defined
chunking, Muthitacharoen, Chen & Mazieres 2001: "A low-bandwidth network file system", section 3.1).

Shards are measured in bytes, so that they are good units of work whatever a row is. A row ends a shard with a
probability in proportion to its bytes; beyond the fewest bytes, a shard so has ``typical`` more of them on average.
"""

from typing import NamedTuple

import numpy as np

from latentloom.ids import first_words

MIB = 2**20


class ShardBytes(NamedTuple):
    """How large shards are: from ``fewest`` to about ``most`` bytes, ``fewest + typical`` on average."""

    fewest: int
    typical: int
    most: int


IMAGES = ShardBytes(32 * MIB, 32 * MIB, 128 * MIB)
TENSORS = ShardBytes(4 * MIB, 4 * MIB, 16 * MIB)


def ends_shard(row_id: str, row_bytes: int, shard_bytes: int, size: ShardBytes) -> bool:
    """Whether the row ``row_id`` (64 hexadecimal digits) is the last of a shard of ``shard_bytes`` with its own."""
    if shard_bytes < size.fewest:
        return False
    return shard_bytes >= size.most or bool(_may_end(np.uint64(int(row_id[:16], 16)), row_bytes, size))


def shard_ranges(
    row_ids: np.ndarray, row_bytes: int | np.ndarray, size: ShardBytes, groups: np.ndarray | None = None
) -> list[range]:
    """The positions of each shard's rows.

    Args:
        row_ids: uint8 (N, 32).
        row_bytes: of every row, or of each one (N,).
        size: of shards.
        groups: one for each row (N,); a shard is of rows of one group. None: all are of one.
    """
    if not len(row_ids):
        return []
    candidates = np.flatnonzero(_may_end(first_words(row_ids), row_bytes, size))
    up_to = np.cumsum(np.broadcast_to(np.asarray(row_bytes, np.int64), len(row_ids)))
    group_ends = np.append([] if groups is None else np.flatnonzero(groups[1:] != groups[:-1]), len(row_ids) - 1)
    ranges: list[range] = []
    start = before = 0
    while start < len(row_ids):
        fewest, most = np.searchsorted(up_to, [before + size.fewest, before + size.most])
        candidate = np.searchsorted(candidates, fewest)
        ends = [most, group_ends[np.searchsorted(group_ends, start)], *candidates[candidate : candidate + 1]]
        end = int(min(ends))
        ranges.append(range(start, end + 1))
        start, before = end + 1, up_to[end]
    return ranges


def _may_end(words: np.ndarray, row_bytes: int | np.ndarray, size: ShardBytes) -> np.ndarray:
    """Whether rows end a shard that has its fewest bytes; ``words`` are their ids' first 8 bytes."""
    return words.astype(np.float64) * size.typical < np.float64(2**64) * row_bytes
