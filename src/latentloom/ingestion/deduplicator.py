"""Keeps each picture once, the first of its kind, and counts; what it remembers decides the splits at the end.

Everything else streams through. For every kept image it remembers the id with the key, to name in a reject what it is a
duplicate of, the split and the perceptual hash: some 250 bytes.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from latentloom.ingestion.near_duplicates import HASH_BYTES
from latentloom.ingestion.preprocess import PreprocessedImage, preview
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shards import ImageRow, SourceCount

ID_BYTES = 32


class Deduplicator:
    """Passes every picture on once, and counts.

    Args:
        counts: of the sources; filled in here.
    """

    def __init__(self, counts: Iterable[SourceCount]) -> None:
        self._counts = {count.name: count for count in counts}
        self.rejects = RejectTable()
        self.captions = 0
        self._keys: dict[bytes, str] = {}
        self._in_train = bytearray()
        self._hashes = bytearray()

    def kept(self, results: Iterable[tuple[str, PreprocessedImage | Reject]]) -> Iterator[ImageRow]:
        """The rows to keep, of results that come with their sources' names, in order."""
        for source, result in results:
            self._counts[source].found += 1
            outcome = result if isinstance(result, Reject) else self._unless_duplicate(result)
            if isinstance(outcome, Reject):
                self._counts[source].rejected += 1
                self.rejects.add(source, outcome)
            else:
                self._counts[source].kept += 1
                self.captions += len(outcome.captions)
                yield outcome

    @property
    def found(self) -> int:
        return sum(count.found for count in self._counts.values())

    @property
    def rejected(self) -> int:
        return self.rejects.reasons.total()

    def ids(self) -> np.ndarray:
        """Of all kept images, in their order: uint8 ``(N, 32)``."""
        return np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, ID_BYTES)

    def in_train(self) -> np.ndarray:
        """Whether an image's id puts it into the training split: bool ``(N,)``."""
        return np.frombuffer(self._in_train, bool)

    def hashes(self) -> np.ndarray:
        """The perceptual hashes: uint8 ``(N, 32)``, or ``(0, 32)`` where none were wanted."""
        return np.frombuffer(self._hashes, np.uint8).reshape(-1, HASH_BYTES)

    def _unless_duplicate(self, image: PreprocessedImage) -> ImageRow | Reject:
        row, own_id = image.row, bytes.fromhex(image.row.id)
        if own_id in self._keys:
            picture = preview(row.png) if self.rejects.wants_preview(Reason.DUPLICATE) else None
            return Reject(row.key, Reason.DUPLICATE, f"the same picture as {self._keys[own_id]}", picture)
        self._keys[own_id] = row.key if len(self._counts) == 1 else f"{row.key} of {row.source}"
        self._in_train.append(row.split == "train")
        self._hashes += image.hash
        return row
