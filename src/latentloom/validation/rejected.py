"""What was rejected, counted by its reason, with the few of each reason that a page shows."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentloom.files import iterate_table

SHOWN = 8  # of each reason


@dataclass(frozen=True)
class RejectedRow:
    key: str
    detail: str
    preview: bytes | None
    id: str | None  # of an image whose latent was rejected


class Rejected:
    """Rows of tables of rejects: how many of each reason, and of each the first few, those with a picture first."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self._pictured: dict[str, list[RejectedRow]] = {}
        self._others: dict[str, list[RejectedRow]] = {}

    def add(self, path: Path, more: Iterable[str]) -> int:
        """Take in a table with source, key, reason, detail, and ``more`` of id and preview; give its rows.

        Raises:
            UserError: when it is missing, damaged or lacks a column.
        """
        before = self.reasons.total()
        for batch in record_batches(path, ["key", "reason", "detail", *more]):
            for item in batch["reason"].value_counts().to_pylist():
                self.reasons[item["values"]] += item["counts"]
                self._show(batch, item["values"])
        return self.reasons.total() - before

    def ordered(self) -> dict[str, int]:
        """The reasons, the most frequent first."""
        return dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0])))

    def shown(self, reason: str) -> list[RejectedRow]:
        """The first few of a reason."""
        return [*self._pictured[reason], *self._others[reason]][:SHOWN]

    def _show(self, batch: pa.RecordBatch, reason: str) -> None:
        nothing = pa.nulls(len(batch))
        previews, ids = (batch[name] if name in batch.schema.names else nothing for name in ("preview", "id"))
        is_reason = pc.equal(batch["reason"], reason)
        for rows, has_picture in ((self._pictured, True), (self._others, False)):
            own = rows.setdefault(reason, [])
            matches = pc.and_(is_reason, pc.equal(pc.is_valid(previews), has_picture))
            for row in np.flatnonzero(matches)[: SHOWN - len(own)].tolist():
                values = (column[row].as_py() for column in (batch["key"], batch["detail"], previews, ids))
                own.append(RejectedRow(*values))


def record_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file in parts, at least one; raises as `iterate_table` does."""
    for part in iterate_table(path, columns):
        yield from part.to_batches() or [pa.RecordBatch.from_pylist([], part.schema)]
