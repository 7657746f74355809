"""Where one shard ends and the next begins: decided by the rows' own ids, not by their positions.

Cut at fixed positions, shards would all change when one row is added or removed early in the list. Cut where a row's
id says so, only the shards around the change do, and DVC stores and pushes no more than those (content-defined
chunking, Muthitacharoen, Chen & Mazieres 2001: "A low-bandwidth network file system", section 3.1).
"""

from collections.abc import Sequence
from typing import Any

FEWEST_ROWS = 512
TYPICAL_ROWS = 512  # beyond the fewest, on average
MOST_ROWS = 2048


def ends_shard(row_id: str, rows: int) -> bool:
    """Whether the row ``row_id`` (64 hexadecimal digits of a hash) is the last of a shard that has ``rows`` with it."""
    if rows >= MOST_ROWS:
        return True
    return rows >= FEWEST_ROWS and int(row_id[:16], 16) % TYPICAL_ROWS == 0


def shard_ranges(row_ids: Sequence[str], groups: Sequence[Any] = ()) -> list[range]:
    """The positions of each shard's rows; with ``groups``, one for each row, a shard is of rows of one group."""
    ranges, start = [], 0
    last = {position - 1 for position in range(1, len(groups)) if groups[position] != groups[position - 1]}
    for position, row_id in enumerate(row_ids):
        if position in last or ends_shard(row_id, position + 1 - start):
            ranges.append(range(start, position + 1))
            start = position + 1
    return [*ranges, range(start, len(row_ids))] if start < len(row_ids) else ranges
