"""Keeps each picture once, the first of its kind, and counts; what it remembers decides the splits at the end.

Everything else streams through. For every kept image it remembers the id with the key, to name in a reject what it is a
duplicate of, the split and the signature by which near duplicates are found: some 450 bytes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from latentloom.ingestion.images import preview
from latentloom.ingestion.near_duplicates import SIGNATURE_BYTES
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shards import ImageRow, SourceCount

ID_BYTES = 32


class Deduplicator:
    """Passes every picture on once, and counts.

    Args:
        counts: of the sources, by name; filled in here.
    """

    def __init__(self, counts: dict[str, SourceCount]) -> None:
        self._counts = counts
        self.rejects = RejectTable()
        self.captions = 0
        self.profiles: Counter[str] = Counter()
        self._keys: dict[bytes, str] = {}
        self._in_train = bytearray()
        self._signatures = bytearray()

    def kept(self, results: Iterable[ImageRow | Reject]) -> Iterator[ImageRow]:
        """The rows to keep, in order."""
        for result in results:
            if isinstance(result, ImageRow) and (first := self._keys.get(bytes.fromhex(result.id))):
                result = self._duplicate(result, first)
            count = self._counts[result.source]
            count.found += 1
            if isinstance(result, Reject):
                count.rejected += 1
                self.rejects.add(result)
            else:
                count.kept += 1
                self._remember(result)
                yield result

    def ids(self) -> np.ndarray:
        """Of all kept images, in their order: uint8 ``(N, 32)``."""
        return np.frombuffer(b"".join(self._keys), np.uint8).reshape(-1, ID_BYTES)

    def in_train(self) -> np.ndarray:
        """Whether an image's id puts it into the training split: bool ``(N,)``."""
        return np.frombuffer(self._in_train, bool)

    def signatures(self) -> np.ndarray:
        """What near duplicates are found by: uint8 ``(N, 224)``, or ``(0, 224)`` where none are wanted."""
        return np.frombuffer(self._signatures, np.uint8).reshape(-1, SIGNATURE_BYTES)

    def _duplicate(self, row: ImageRow, first: str) -> Reject:
        picture = preview(row.png) if self.rejects.wants_preview(Reason.DUPLICATE) else None
        return Reject(row.source, row.key, Reason.DUPLICATE, f"the same picture as {first}", picture)

    def _remember(self, row: ImageRow) -> None:
        self._keys[bytes.fromhex(row.id)] = row.key if len(self._counts) == 1 else f"{row.key} of {row.source}"
        self._in_train.append(row.split == "train")
        self._signatures += row.signature
        self.captions += len(row.captions)
        self.profiles[row.profile] += 1
