"""Which of the prepared samples are kept: each picture once, the first of its kind; and what is remembered of them.

All else streams through. Remembered are, for every image kept, its id with its key, to tell what a duplicate is a
duplicate of, its split and its perceptual hash: some 250 bytes.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from latentloom.ingestion.near_duplicates import HASH_BYTES
from latentloom.ingestion.prepared import Prepared, preview
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shards import ImageRow, SourceCount

ID_BYTES = 32


class Sieve:
    """Lets every picture through once, and counts.

    Args:
        counts: of the sources, by their names; filled in here.
    """

    def __init__(self, counts: Mapping[str, SourceCount]) -> None:
        self.counts = counts
        self.rejects = RejectTable()
        self.captions = 0
        self._keys: dict[bytes, str] = {}
        self._in_train = bytearray()
        self._hashes = bytearray()

    def kept(self, results: Iterable[tuple[str, Prepared | Reject]]) -> Iterator[ImageRow]:
        """The rows to keep, of results that come with their sources' names, in order."""
        for source, result in results:
            self.counts[source].found += 1
            outcome = result if isinstance(result, Reject) else self._unless_duplicate(result)
            if isinstance(outcome, Reject):
                self.counts[source].rejected += 1
                self.rejects.add(source, outcome)
            else:
                self.counts[source].kept += 1
                self.captions += len(outcome.captions)
                yield outcome

    def ids(self) -> np.ndarray:
        """Of all kept images, in their order: uint8 ``(N, 32)``."""
        return np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, ID_BYTES)

    def in_train(self) -> np.ndarray:
        """Whether an image's id puts it into the training split: bool ``(N,)``."""
        return np.frombuffer(self._in_train, bool)

    def hashes(self) -> np.ndarray:
        """The perceptual hashes: uint8 ``(N, 32)``, or ``(0, 32)`` where none were wanted."""
        return np.frombuffer(self._hashes, np.uint8).reshape(-1, HASH_BYTES)

    def total(self, name: str) -> int:
        """``found``, ``kept`` or ``rejected`` over all sources."""
        return sum(getattr(count, name) for count in self.counts.values())

    def _unless_duplicate(self, prepared: Prepared) -> ImageRow | Reject:
        row, own_id = prepared.row, bytes.fromhex(prepared.row.id)
        if own_id in self._keys:
            picture = preview(row.png) if self.rejects.wants_preview(Reason.DUPLICATE) else None
            return Reject(row.key, Reason.DUPLICATE, f"the same picture as {self._keys[own_id]}", picture)
        self._keys[own_id] = row.key if len(self.counts) == 1 else f"{row.key} of {row.source}"
        self._in_train.append(row.split == "train")
        self._hashes += prepared.hash
        return row
