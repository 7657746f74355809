"""Keeps each picture once, the first of its kind, and counts; what it remembers decides the splits at the end.

Everything else streams through. For every kept image it remembers the id with source and key, to name in a reject what
it is a duplicate of, the split, and the signature by which near duplicates are found: 300 bytes and the key's, in
columns without an object per row. Where equal files join their captions, it remembers the files' hashes, and the
captions of all files but the first.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from latentloom.ids import ID_BYTES
from latentloom.ingestion.growing import Ids, Texts
from latentloom.ingestion.images import preview
from latentloom.ingestion.near_duplicates import SIGNATURE_BYTES
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shard_writer import ImageRow, JoinedCaptions, SourceCount
from latentloom.ingestion.size_table import SizeTable


class Deduplicator:
    """Passes every picture on once, and counts.

    Args:
        counts: of the sources, by name; filled in here.
        joining: the sources of which equal files are one image with the captions of all.
    """

    def __init__(self, counts: dict[str, SourceCount], joining: Collection[str] = ()) -> None:
        self._counts, self._joining = counts, joining
        self.rejects = RejectTable()
        self.captions = self.joined = 0
        self.joined_captions = JoinedCaptions()
        self.profiles: Counter[str] = Counter()
        self.sizes = SizeTable()
        self._source_names = list(counts)
        self._ids = Ids()
        self._keys, self._sources = Texts(), array("H")
        self._file_hashes = bytearray()  # where captions are joined
        self._in_train = bytearray()
        self._signatures = bytearray()

    def kept(self, results: Iterable[ImageRow | Reject], limit: int | None = None) -> Iterator[ImageRow]:
        """The rows to keep, in order; at most ``limit``, the last with what is joined to it from right behind it."""
        for result in results:
            first = self._ids.find(bytes.fromhex(result.id)) if isinstance(result, ImageRow) else None
            if first is not None and self._joins(result, first):
                self.joined += 1
                self.joined_captions.add(first, result.captions)
                continue
            if len(self._ids) == limit:
                return
            if first is not None:
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
        return self._ids.array()

    def in_train(self) -> np.ndarray:
        """Whether an image's id puts it into the training split: bool ``(N,)``."""
        return np.frombuffer(self._in_train, bool)

    def signatures(self) -> np.ndarray:
        """What near duplicates are found by: uint8 ``(N, 224)``, or ``(0, 224)`` where none are wanted."""
        return np.frombuffer(self._signatures, np.uint8).reshape(-1, SIGNATURE_BYTES)

    def _joins(self, row: ImageRow, first: int) -> bool:
        """Whether a picture seen before is the very file of a source whose equal files are one image."""
        of_one_source = row.source == self._source_names[self._sources[first]]
        if not of_one_source or row.source not in self._joining:
            return False
        return self._file_hashes[first * ID_BYTES : (first + 1) * ID_BYTES] == row.file_hash

    def _duplicate(self, row: ImageRow, first: int) -> Reject:
        picture = preview(bytes(row.png)) if self.rejects.wants_preview(Reason.DUPLICATE) else None
        source = f" of {self._source_names[self._sources[first]]}" if len(self._counts) > 1 else ""
        return Reject(
            row.source, row.key, Reason.DUPLICATE, f"the same picture as {self._keys[first]}{source}", picture
        )

    def _remember(self, row: ImageRow) -> None:
        self._ids.add(bytes.fromhex(row.id))
        self._sources.append(self._source_names.index(row.source))
        self._keys.append(row.key)
        if self._joining:
            self._file_hashes += row.file_hash
        self._in_train.append(row.split == "train")
        self._signatures += row.signature
        self.captions += len(set(row.captions))
        self.profiles[row.profile] += 1
        self.sizes.add(row)
