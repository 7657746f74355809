"""Columns that grow row by row without a Python object per row: texts, and ids that are found again.

A dict of ten million ids takes 2 GB before it holds anything; `Ids` takes 45 bytes for each.
"""

from array import array

import numpy as np

from latentloom.ids import ID_BYTES

FEWEST_SLOTS = 2**10


class Texts:
    """Texts by their number: their UTF-8 one behind the other, and where each ends."""

    def __init__(self) -> None:
        self._content, self._ends = bytearray(), array("Q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self._content[self._ends[number] : self._ends[number + 1]].decode()

    def append(self, text: str) -> None:
        self._content += text.encode()
        self._ends.append(len(self._content))


class Ids:
    """Distinct ids of 32 bytes in the order in which they came, found by a hash table with linear probing.

    An id is a hash already, so its first bytes are the slot at which its search begins. A slot holds an id's place, or
    -1. At most half of the slots are taken, so that a search reads 1.5 of them where the id is there and 2.5 where not
    (Knuth, The Art of Computer Programming, volume 3, section 6.4).
    """

    def __init__(self) -> None:
        self._content = bytearray()
        self._resize(FEWEST_SLOTS)

    def __len__(self) -> int:
        return len(self._content) // ID_BYTES

    def find(self, own_id: bytes) -> int | None:
        """The place of an id; None where it has not been added."""
        slot = self._slot_of(own_id)
        return None if self._slots[slot] < 0 else self._slots[slot]

    def add(self, own_id: bytes) -> None:
        """Take in an id that `find` does not know."""
        if 2 * len(self) >= len(self._slots):
            self._resize(2 * len(self._slots))
        self._slots[self._slot_of(own_id)] = len(self)
        self._content += own_id

    def array(self) -> np.ndarray:
        """All ids, uint8 ``(N, 32)``; while it is in use none can be added."""
        return np.frombuffer(self._content, np.uint8).reshape(-1, ID_BYTES)

    def _slot_of(self, own_id: bytes) -> int:
        """The slot that has an id, or the empty one where it belongs."""
        slots, content = self._slots, self._content
        slot = int.from_bytes(own_id[:8]) & self._mask
        while (place := slots[slot]) >= 0 and content[place * ID_BYTES : (place + 1) * ID_BYTES] != own_id:
            slot = slot + 1 & self._mask
        return slot

    def _resize(self, size: int) -> None:
        slots, self._mask = np.full(size, -1, np.int32), size - 1
        self._slots = memoryview(slots)  # three times as fast as the array, for one item
        home = self.array()[:, :8].copy().view(">u8").ravel() & np.uint64(self._mask)
        order = np.argsort(home)
        # In the order of their homes, each goes to its own, or right behind the one before it.
        along = np.arange(len(order))
        slot = along + np.maximum.accumulate(home[order].astype(np.int64) - along)
        fits = slot < size
        slots[slot[fits]] = order[fits]
        for place in order[~fits].tolist():  # beyond the last slot: the first free one from the beginning
            self._slots[self._slot_of(bytes(self._content[place * ID_BYTES : (place + 1) * ID_BYTES]))] = place
