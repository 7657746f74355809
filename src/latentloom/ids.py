"""Ids of images and captions, SHA-256 hashes: 64 hexadecimal digits in files, 32 bytes in memory.

A list of ten million ids as strings takes 1.1 GB, and a dict of them 2 GB; as an array (N, 32) they take 0.32 GB, and
`positions` finds one array's ids in another by sorting, without an object per id.
"""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

ID_BYTES = 32


def from_hex(ids: pa.Array | pa.ChunkedArray | Iterable[str]) -> np.ndarray:
    """Ids of 64 hexadecimal digits as uint8 ``(N, 32)``.

    Raises:
        ValueError: when one has not 64 such digits.
    """
    if isinstance(ids, pa.ChunkedArray):
        return np.concatenate([np.empty((0, ID_BYTES), np.uint8), *map(from_hex, ids.chunks)])
    column = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string())
    values = bytearray.fromhex(b"".join(_bytes(column.cast(pa.large_binary()))).decode())
    if len(values) != ID_BYTES * len(column):
        raise ValueError(f"ids have {2 * ID_BYTES} hexadecimal digits")
    return np.frombuffer(values, np.uint8).reshape(-1, ID_BYTES)


def to_hex(ids: np.ndarray) -> pa.Array:
    """Ids, uint8 ``(N, 32)``, as an Arrow array of strings of 64 hexadecimal digits."""
    digits = ids.tobytes().hex().encode()
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * 2 * ID_BYTES
    text = pa.LargeStringArray.from_buffers(len(ids), pa.py_buffer(offsets), pa.py_buffer(digits))
    return text.cast(pa.string()) if len(digits) < 2**31 else text


def positions(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each of the ids ``wanted`` is ``among`` others, both uint8 ``(N, 32)``: int64, -1 where it is not.

    Of ids that are there several times, the first.
    """
    return Lookup(among).positions(wanted)


class Lookup:
    """Ids, uint8 ``(N, 32)``, sorted once, to find others among them several times, as a table is read in parts."""

    def __init__(self, among: np.ndarray) -> None:
        words = first_words(among)
        self._among, self._order = among, np.argsort(words, kind="stable")
        self._words = words[self._order]

    def positions(self, wanted: np.ndarray) -> np.ndarray:
        """As `positions`."""
        own = first_words(wanted)
        sorting = np.argsort(own)  # sorted questions read the sorted words from one end to the other
        at = np.empty(len(own), np.int64)
        at[sorting] = np.searchsorted(self._words, own[sorting])
        found, open_questions = np.full(len(own), -1, np.int64), np.arange(len(own))
        while len(open_questions):  # once, unless two ids begin with the same 8 bytes
            open_questions = open_questions[at[open_questions] < len(self._words)]
            open_questions = open_questions[self._words[at[open_questions]] == own[open_questions]]
            candidates = self._order[at[open_questions]]
            equal = (self._among[candidates] == wanted[open_questions]).all(axis=1)
            found[open_questions[equal]] = candidates[equal]
            open_questions = open_questions[~equal]
            at[open_questions] += 1
        return found


def ascending(ids: np.ndarray) -> np.ndarray:
    """The order (N,) that sorts ids, uint8 ``(N, 32)``; equal ones stay in theirs."""
    words = first_words(ids)
    order = np.argsort(words, kind="stable")
    if (words[order[1:]] == words[order[:-1]]).any():  # two that begin alike, as hashes hardly do
        return np.lexsort(ids.T[::-1])
    return order


def first_backwards(ids: np.ndarray, count: int) -> np.ndarray:
    """Positions of at most ``count`` ids, uint8 ``(N, 32)``: those whose digits, read backwards, come first, in order.

    That is a fair sample of what the ids are hashes of, and the same one for the same ids, of whichever split.
    """
    last = ids[:, :-9:-1]
    words = first_words(last << 4 | last >> 4)  # the last 16 digits backwards: two digits are a byte
    bound = np.partition(words, count - 1)[count - 1] if len(words) > count else words.max(initial=0)
    candidates = np.flatnonzero(words <= bound)
    digits = [text[::-1] for text in to_hex(ids[candidates]).to_pylist()]
    return candidates[np.argsort(np.array(digits, str), kind="stable")[:count]]


def first_words(ids: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each id, uint8 ``(N, 32)``, as a number that sorts as the id does: uint64 ``(N,)``."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


def _bytes(column: pa.Array) -> Iterable[memoryview]:
    _, offsets, content = column.buffers()
    if content is None:
        return
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    if (np.diff(ends) != 2 * ID_BYTES).any():
        raise ValueError(f"ids have {2 * ID_BYTES} hexadecimal digits")
    yield memoryview(content)[ends[0] : ends[-1]]
