"""Pairs of pictures that look alike, by perceptual hash.

A picture's perceptual hash has 256 bits: which of the 16x16 lowest frequencies of its 64x64 grey version lie above
their median (``imagehash.phash``). Two pictures are near duplicates when few bits differ: a photograph saved again as
JPEG, scaled or made darker differs in 0 to 4 bits. The hash is blind to colour, and noise where all is smooth.

All such pairs are found without comparing all pairs, by multi-index hashing (Norouzi, Punjani & Fleet 2012: "Fast
search in Hamming space with multi-index hashing", section 3): cut the bits into one band more than may differ, and
each pair agrees in at least one whole band; only pairs that share a band's value are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentloom.files import atomic_path

HASH_SIDE = 16
HASH_BITS = HASH_SIDE**2
HASH_BYTES = HASH_BITS // 8
WORD_BITS = 64
ROWS_AT_ONCE = 2**16

SCHEMA = pa.schema([("image_id", pa.string()), ("twin_id", pa.string()), ("distance", pa.int32())])


@dataclass(frozen=True)
class Pairs:
    """Near duplicates as positions in the given images, ``first < second``, sorted; ``distance`` in bits; each (P,)."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """The 32 bytes of the perceptual hash of pixels, uint8 ``(H, W, 3)``."""
    import imagehash

    return np.packbits(imagehash.phash(Image.fromarray(pixels), hash_size=HASH_SIDE).hash).tobytes()


def find_near_duplicates(hashes: np.ndarray, distance: int) -> Pairs:
    """All pairs of hashes, uint8 ``(N, 32)``, of which at most ``distance`` bits differ.

    Equal hashes are paired as a star, not all with all: each with the first of its kind, and only the first with other
    hashes. So ten thousand blank pictures are 9,999 pairs, and no link between two pictures is lost. Memory is some
    100 bytes per hash beside the pairs. Time grows fast beyond a distance of 16, and with the square of the hashes that
    share a band's value, as thousands of pictures of one layout do.
    """
    words = np.ascontiguousarray(hashes).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal hashes the first comes first
    is_first = np.ones(len(order), bool)
    is_first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    firsts = order[is_first]
    others = order[~is_first]
    found = [(firsts[np.cumsum(is_first) - 1][~is_first], others, np.zeros(len(others), np.int32))]
    for one, other, differing in _close_pairs(hashes[firsts], distance):
        one, other = firsts[one], firsts[other]
        found.append((np.minimum(one, other), np.maximum(one, other), differing))
    first, second, differing = (np.concatenate(column) for column in zip(*found, strict=True))
    sorting = np.lexsort((second, first))
    return Pairs(first[sorting], second[sorting], differing[sorting])


def write_near_duplicates(path: Path, ids: np.ndarray, pairs: Pairs) -> None:
    """Write the pairs with their images' ids, uint8 ``(N, 32)``; the file is there, with its columns, for no pairs."""
    with atomic_path(path, room=132 * len(pairs)) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for start in range(0, len(pairs), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            columns = [_hex(ids[pairs.first[part]]), _hex(ids[pairs.second[part]]), pairs.distance[part]]
            writer.write_table(pa.table(columns, SCHEMA))


def _close_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions and distances of all close pairs of distinct hashes, each pair once; band by band, in pieces."""
    bands = _bands(hashes, distance + 1)
    words = np.ascontiguousarray(hashes).view(np.uint64)
    for number, band in enumerate(bands):
        order = np.argsort(band)
        values, ordered = band[order], words[order]
        at, step = np.arange(len(order) - 1), 1
        while len(at):  # compare each hash with the one `step` places further, while that has the same value
            at = at[: np.searchsorted(at, len(order) - step)]
            at = at[values[at] == values[at + step]]
            differing = np.bitwise_count(ordered[at] ^ ordered[at + step]).sum(axis=1, dtype=np.int32)
            close = differing <= distance
            one, other = order[at[close]], order[at[close] + step]
            fresh = np.ones(len(one), bool)
            for earlier in bands[:number]:  # the pair was found by an earlier band already
                fresh &= earlier[one] != earlier[other]
            if fresh.any():
                yield one[fresh], other[fresh], differing[close][fresh]
            step += 1


def _bands(hashes: np.ndarray, count: int) -> np.ndarray:
    """The bits of each hash in ``count`` bands, each as one number: uint64 ``(count, N)``.

    A band takes every ``count``-th bit, so it holds low and high frequencies: in one of high frequencies alone all
    plain pictures would agree, and have to be compared. Of a band wider than 64 bits the first 64 lose no pair.
    """
    values = np.zeros((count, len(hashes), WORD_BITS // 8), np.uint8)
    for start in range(0, len(hashes), ROWS_AT_ONCE):
        bits = np.unpackbits(hashes[start : start + ROWS_AT_ONCE], axis=1)
        for band in range(count):
            packed = np.packbits(bits[:, band::count][:, :WORD_BITS], axis=1)
            values[band, start : start + len(packed), : packed.shape[1]] = packed
    return values.view(np.uint64)[..., 0]


def _hex(ids: np.ndarray) -> pa.Array:
    return pa.array([own_id.tobytes().hex() for own_id in ids], pa.string())
