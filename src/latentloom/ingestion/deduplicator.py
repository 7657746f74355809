"""Keeps each picture once, the first of its kind, and counts; what it remembers decides the splits at the end.

Everything else streams through. For every kept image it remembers the id with source and key, to name in a reject what
it is a duplicate of, the file's hash, the split and the signature by which near duplicates are found: some 550 bytes.
Where equal files join their captions, it remembers those of all but the first.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from latentloom.ingestion.images import preview
from latentloom.ingestion.near_duplicates import SIGNATURE_BYTES
from latentloom.ingestion.rejects import Reason, Reject, RejectTable
from latentloom.ingestion.shards import ImageRow, SourceCount
from latentloom.ingestion.size_table import SizeTable

ID_BYTES = 32


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
        self.profiles: Counter[str] = Counter()
        self.sizes = SizeTable()
        self._firsts: dict[bytes, tuple[str, str, bytes]] = {}  # source, key, hash of the file
        self._joined: dict[bytes, list[str]] = {}
        self._in_train = bytearray()
        self._signatures = bytearray()

    def kept(self, results: Iterable[ImageRow | Reject], limit: int | None = None) -> Iterator[ImageRow]:
        """The rows to keep, in order; at most ``limit``, the last with what is joined to it from right behind it."""
        for result in results:
            first = self._firsts.get(bytes.fromhex(result.id)) if isinstance(result, ImageRow) else None
            if first and result.source in self._joining and (result.source, result.file_hash) == first[::2]:
                self.joined += 1
                joined = self._joined.setdefault(bytes.fromhex(result.id), [])
                joined += [caption for caption in result.captions if caption not in joined]
                continue
            if len(self._firsts) == limit:
                return
            if first:
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
        return np.frombuffer(b"".join(self._firsts), np.uint8).reshape(-1, ID_BYTES)

    def in_train(self) -> np.ndarray:
        """Whether an image's id puts it into the training split: bool ``(N,)``."""
        return np.frombuffer(self._in_train, bool)

    def signatures(self) -> np.ndarray:
        """What near duplicates are found by: uint8 ``(N, 224)``, or ``(0, 224)`` where none are wanted."""
        return np.frombuffer(self._signatures, np.uint8).reshape(-1, SIGNATURE_BYTES)

    def joined_captions(self) -> dict[int, list[str]]:
        """What the kept images have gained from equal pictures, by their places in the order of all that are kept."""
        return {place: self._joined[own] for place, own in enumerate(self._firsts) if own in self._joined}

    def _duplicate(self, row: ImageRow, first: tuple[str, str, bytes]) -> Reject:
        picture = preview(row.png) if self.rejects.wants_preview(Reason.DUPLICATE) else None
        source, key, _ = first
        detail = f"the same picture as {key}" + (f" of {source}" if len(self._counts) > 1 else "")
        return Reject(row.source, row.key, Reason.DUPLICATE, detail, picture)

    def _remember(self, row: ImageRow) -> None:
        self._firsts[bytes.fromhex(row.id)] = (row.source, row.key, row.file_hash)
        self._in_train.append(row.split == "train")
        self._signatures += row.signature
        self.captions += len(set(row.captions))
        self.profiles[row.profile] += 1
        self.sizes.add(row)
