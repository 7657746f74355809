"""Pairs of pictures that look alike: by perceptual hash, and then by colour.

A picture's perceptual hash has 256 bits: which of the 16x16 lowest frequencies of its 64x64 grey version lie above
their median (``imagehash.phash``). A photograph saved again as JPEG, scaled or made darker differs in 0 to 4 bits. But
the hash is blind to colour, and noise where all is smooth: a green square and a blue one have the same.

So two pictures are near duplicates when few bits differ, and no part of one has a colour that its counterpart has not:
the mean colours of all 8x8 parts, made equally bright on the whole, lie within ``COLOUR_TOLERANCE`` in CIELAB. Of a
photograph scaled to half and saved as JPEG of quality 50 to 90, the largest difference of a part is at most 3, of one
made a tenth darker 0.6. An emoji in two skin tones differs by more than 5 in 99 of 100 pairs whose hashes are close; in
the others the skin is a few pixels.

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
COLOUR_SIDE = 8
SIGNATURE_BYTES = HASH_BYTES + 3 * COLOUR_SIDE**2
COLOUR_TOLERANCE = 5.0  # in CIELAB, where 2.3 is a just noticeable difference
BRIGHTNESS_RATIO = 1.25  # the most by which pictures may differ in brightness, to be compared as if equally bright
WORD_BITS = 64
ROWS_AT_ONCE = 2**16
COLOURS_AT_ONCE = 2**12
CENTRE = slice(27, 37, 9)  # two of the 8x8 parts

SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
SRGB_TO_XYZ_OF_WHITE = (SRGB_TO_XYZ / SRGB_TO_XYZ.sum(axis=1, keepdims=True)).T  # white: 1, 1, 1

SCHEMA = pa.schema([("image_id", pa.string()), ("twin_id", pa.string()), ("distance", pa.int32())])


@dataclass(frozen=True)
class Pairs:
    """Near duplicates as positions in the given images, ``first < second``, sorted; ``distance`` in bits; each (P,)."""

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def signature(pixels: np.ndarray) -> bytes:
    """What pixels, uint8 ``(H, W, 3)``, are compared by: the perceptual hash, then the mean colours of 8x8 parts."""
    import imagehash

    image = Image.fromarray(pixels)
    bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
    colours = image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    return np.packbits(bits).tobytes() + colours.tobytes()


def find_near_duplicates(signatures: np.ndarray, distance: int) -> Pairs:
    """All pairs of signatures, uint8 ``(N, 224)``, of close colours, of whose hashes at most ``distance`` bits differ.

    Equal signatures are paired as a star, not all with all: each with the first of its kind, and only the first with
    others. So ten thousand white pictures are 9,999 pairs, and no link between two pictures is lost. Memory is some
    100 bytes per signature beside the pairs. Time grows fast beyond a distance of 16, and with the square of the hashes
    that share a band's value, as thousands of pictures of one layout do.
    """
    words = np.ascontiguousarray(signatures).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal signatures the first comes first
    is_first = np.ones(len(order), bool)
    is_first[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    firsts = order[is_first]
    others = order[~is_first]
    found = [(firsts[np.cumsum(is_first) - 1][~is_first], others, np.zeros(len(others), np.int32))]
    hashes, colours = signatures[firsts, :HASH_BYTES], signatures[:, HASH_BYTES:]
    brightness = _brightness(colours)
    for one, other, differing in _close_pairs(hashes, distance):
        one, other = firsts[one], firsts[other]
        alike = _colours_are_close(colours, brightness, one, other)
        one, other = one[alike], other[alike]
        found.append((np.minimum(one, other), np.maximum(one, other), differing[alike]))
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


def _brightness(colours: np.ndarray) -> np.ndarray:
    """Of each picture as a whole, never 0: float32 ``(N,)``."""
    pieces = [
        colours[start : start + ROWS_AT_ONCE].astype(np.float32) for start in range(0, len(colours), ROWS_AT_ONCE)
    ]
    return np.concatenate([np.sqrt(np.square(piece).sum(axis=1) + 1) for piece in pieces] or [np.ones(0, np.float32)])


def _colours_are_close(colours: np.ndarray, brightness: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether two pictures' parts have about the same colours, bool ``(P,)``.

    Args:
        colours: sRGB of all pictures, uint8 ``(N, 192)``.
        brightness: of all pictures, ``(N,)``.
        one, other: positions in them, each ``(P,)``.
    """
    parts = colours.reshape(-1, COLOUR_SIDE**2, 3)
    alike = np.arange(len(one))
    for places in (CENTRE, slice(None)):  # the centre rules out most, at a thirtieth of the time
        close = np.zeros(len(alike), bool)
        for start in range(0, len(alike), COLOURS_AT_ONCE):
            rows = alike[start : start + COLOURS_AT_ONCE]
            ratio = (brightness[other[rows]] / brightness[one[rows]]).clip(1 / BRIGHTNESS_RATIO, BRIGHTNESS_RATIO)
            to_middle = np.sqrt(ratio)[:, None, None]
            a, b = (parts[own[rows], places].astype(np.float32) for own in (one, other))
            difference = np.linalg.norm(_cielab(a * to_middle) - _cielab(b / to_middle), axis=-1)
            close[start : start + COLOURS_AT_ONCE] = difference.max(axis=-1) <= COLOUR_TOLERANCE
        alike = alike[close]
    return np.isin(np.arange(len(one)), alike, assume_unique=True)


def _cielab(srgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*, a*, b* under D65 of sRGB values from 0 to 255, which IEC 61966-2-1 defines; ``(..., 3)`` both."""
    value = srgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    relative = linear @ SRGB_TO_XYZ_OF_WHITE
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _close_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions and distances of all close pairs of hashes, each pair once; band by band, in pieces."""
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
