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

Thousands of pictures of one layout, as of products on white, share the values of bands. Where more than ``CROWD`` do,
to compare them all would take the square of their number, and were they all alike, so would the list. There each is
compared with the ``NEIGHBOURS`` that follow it when they are sorted by the next band, then by colour; and a pair is
listed only when it joins two groups of pictures that no other pair joins: trees of links instead of all pairs. Pictures
that are alike still follow each other into one split, unless no chain of such neighbours leads from one to the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from latentloom import ids
from latentloom.files import atomic_path

HASH_SIDE = 16
HASH_BITS = HASH_SIDE**2
HASH_BYTES = HASH_BITS // 8
COLOUR_SIDE = 8
SIGNATURE_BYTES = HASH_BYTES + 3 * COLOUR_SIDE**2
COLOUR_TOLERANCE = 5.0  # in CIELAB, where 2.3 is a just noticeable difference
BRIGHTNESS_RATIO = 1.25  # the most by which pictures may differ in brightness, to be compared as if equally bright
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 by the golden ratio: it carries low bits into all above them
ROWS_AT_ONCE = 2**16
COLOURS_AT_ONCE = 2**12
CROWD = 1000
NEIGHBOURS = 250
CENTRE = slice(27, 37, 9)  # two of the 8x8 parts
CENTRE_COLOUR = slice(3 * CENTRE.start, 3 * CENTRE.start + 3)

SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
SRGB_TO_XYZ_OF_WHITE = (SRGB_TO_XYZ / SRGB_TO_XYZ.sum(axis=1, keepdims=True)).T  # white: 1, 1, 1

SCHEMA = pa.schema([("image_id", pa.string()), ("twin_id", pa.string()), ("distance", pa.int32())])


@dataclass(frozen=True)
class Pairs:
    """Near duplicates as positions in the given images, ``first < second``, sorted; ``distance`` in bits; each (P,).

    ``crowded`` counts the images of which not all pairs are listed, but links to groups, since a value of one of their
    bands is that of more than ``CROWD`` others.
    """

    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray
    crowded: int = 0

    def __len__(self) -> int:
        return len(self.first)


def signature(pixels: np.ndarray) -> bytes:
    """What pixels, uint8 ``(H, W, 3)``, are compared by: the perceptual hash, then the mean colours of 8x8 parts."""
    import imagehash

    image = Image.fromarray(pixels)
    bits = imagehash.phash(image, hash_size=HASH_SIDE).hash
    colours = image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    return np.packbits(bits).tobytes() + colours.tobytes()


def find_near_duplicates(signatures: np.ndarray, distance: int, order: np.ndarray | None = None) -> Pairs:
    """All pairs of signatures, uint8 ``(N, 224)``, of close colours, of whose hashes at most ``distance`` bits differ.

    Equal signatures are paired as a star, not all with all: each with the first of its kind, and only the first with
    others. So ten thousand white pictures are 9,999 pairs, and no link between two pictures is lost. Memory is some
    150 bytes per signature beside the pairs. Time grows fast beyond a distance of 16, and at most with the number of
    signatures times ``CROWD`` and the bands.

    Args:
        order: the signatures' places in the order in which they count as first, second and so on; ``(N,)``.
    """
    order = np.arange(len(signatures)) if order is None else order
    kinds, kind = _kinds(signatures, order)
    is_first = np.zeros(len(order), bool)
    is_first[kinds] = True
    others = np.flatnonzero(~is_first)
    found = [(kinds[kind[others]], others, np.zeros(len(others), np.int32))]
    colours = signatures[:, HASH_BYTES:]
    brightness = _brightness(colours)

    def are_alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return _colours_are_close(colours, brightness, order[kinds[one]], order[kinds[other]])

    shade = colours[order[kinds], CENTRE_COLOUR].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    search = _Search(signatures[order[kinds], :HASH_BYTES], shade, distance, are_alike)
    for one, other, differing in search.pairs():
        one, other = kinds[one], kinds[other]
        found.append((np.minimum(one, other), np.maximum(one, other), differing))
    first, second, differing = (np.concatenate(column) for column in zip(*found, strict=True))
    sorting = np.lexsort((second, first))
    first, second, differing = first[sorting], second[sorting], differing[sorting]
    fresh = np.ones(len(first), bool)  # a crowd may have found a pair that a later band finds too
    fresh[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    return Pairs(first[fresh], second[fresh], differing[fresh], int(search.crowded.any(axis=0).sum()))


def write_near_duplicates(path: Path, images: np.ndarray, pairs: Pairs) -> None:
    """Write the pairs with their images' ids, uint8 ``(N, 32)``; the file is there, with its columns, for no pairs."""
    with atomic_path(path, room=132 * len(pairs)) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for start in range(0, len(pairs), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            columns = [ids.to_hex(images[pairs.first[part]]), ids.to_hex(images[pairs.second[part]])]
            writer.write_table(pa.table([*columns, pairs.distance[part]], SCHEMA))


def _kinds(signatures: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal signatures are of one kind: where in ``order`` the first of each kind is, and the kind of each, ``(N,)``.

    They are sorted by a hash of theirs, then compared: two kinds with one hash, which come once in 2^64 pairs, may
    be counted as some more.
    """
    mixed = np.zeros(len(order), np.uint64)
    for start in range(0, len(order), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        for word in np.ascontiguousarray(signatures[order[part]]).view(np.uint64).T:
            mixed[part] = (mixed[part] ^ word) * MULTIPLIER
            mixed[part] ^= mixed[part] >> 32
    along = np.argsort(mixed, kind="stable")  # of equal signatures the first comes first
    begins = np.ones(len(order), bool)
    begins[1:] = mixed[along[1:]] != mixed[along[:-1]]
    same = np.flatnonzero(~begins)
    for start in range(0, len(same), ROWS_AT_ONCE):
        part = same[start : start + ROWS_AT_ONCE]
        pair = (signatures[order[along[places]]] for places in (part, part - 1))
        begins[part] = (np.not_equal(*pair)).any(axis=1)
    kind = np.empty(len(order), np.int64)
    kind[along] = np.cumsum(begins) - 1
    return along[begins], kind


def _brightness(colours: np.ndarray) -> np.ndarray:
    """Of each picture as a whole, never 0: float32 ``(N,)``."""
    brightness = np.empty(len(colours), np.float32)
    for start in range(0, len(colours), COLOURS_AT_ONCE):
        part = slice(start, start + COLOURS_AT_ONCE)
        brightness[part] = np.sqrt(np.square(colours[part].astype(np.float32)).sum(axis=1) + 1)
    return brightness


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


class _Search:
    """All close pairs of hashes whose colours are alike, and of crowds the links; band by band, in pieces.

    Args:
        hashes: uint8 ``(N, 32)``, distinct but for those of other colours.
        shades: a number of each, ``(N,)``: close ones are often of pictures whose colours are.
        distance: the most bits in which a pair differs.
        are_alike: whether the colours of pairs are, given their positions.

    Attributes:
        crowded: bool ``(bands, N)``, whether a hash shares the band's value with more than ``CROWD`` others.
    """

    def __init__(
        self,
        hashes: np.ndarray,
        shades: np.ndarray,
        distance: int,
        are_alike: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self._bands = _bands(hashes, distance + 1)
        self._words = np.ascontiguousarray(hashes).view(np.uint64)
        self._shades, self._distance, self._are_alike = shades, distance, are_alike
        self._group = np.arange(len(hashes))  # of each, another of its group; of one in each group, itself
        self._leads_to = memoryview(self._group)  # the same, faster for one item
        self.crowded = np.zeros((len(self._bands), len(hashes)), bool)

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Positions and distances."""
        for number, band in enumerate(self._bands):
            order = np.argsort(band)
            values = band[order]
            starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
            sizes = np.diff(starts, append=len(values))
            for start, size in zip(starts[sizes > CROWD + 1], sizes[sizes > CROWD + 1], strict=True):
                members = order[start : start + size]
                self.crowded[number, members] = True
                yield from self._links(number, members)
            at, step = np.flatnonzero(np.repeat(sizes <= CROWD + 1, sizes)), 1
            while len(at):  # compare each hash with the one `step` places further, while that has the same value
                at = at[: np.searchsorted(at, len(order) - step)]
                at = at[values[at] == values[at + step]]
                for start in range(0, len(at), ROWS_AT_ONCE):
                    part = at[start : start + ROWS_AT_ONCE]
                    yield self._close(number, order[part], order[part + step])
                step += 1

    def _close(self, number: int, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of the pairs, which share the value of band ``number``, that are close and were not found before."""
        differing = np.bitwise_count(self._words[one] ^ self._words[other]).sum(axis=1, dtype=np.int32)
        close = differing <= self._distance
        one, other, differing = one[close], other[close], differing[close]
        fresh = np.ones(len(one), bool)
        for earlier, crowded in zip(self._bands[:number], self.crowded[:number], strict=True):
            fresh &= (earlier[one] != earlier[other]) | crowded[one]
        one, other, differing = one[fresh], other[fresh], differing[fresh]
        alike = self._are_alike(one, other)
        return one[alike], other[alike], differing[alike]

    def _links(self, number: int, members: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of a crowd, close pairs that join two groups; the groups are joined then."""
        next_band = self._bands[(number + 1) % len(self._bands)]
        members = members[np.lexsort((members, self._shades[members], next_band[members]))]
        for step in range(1, NEIGHBOURS + 1):
            group = self._groups_of(members)
            apart = np.flatnonzero(group[:-step] != group[step:])
            for start in range(0, len(apart), ROWS_AT_ONCE):
                part = apart[start : start + ROWS_AT_ONCE]
                one, other, differing = self._close(number, members[part], members[part + step])
                joins = [self._join(*pair) for pair in zip(one.tolist(), other.tolist(), strict=True)]
                yield one[joins], other[joins], differing[joins]

    def _groups_of(self, members: np.ndarray) -> np.ndarray:
        """The group of each, as the position of one that is in it."""
        group = self._group[members]
        while (further := self._group[group] != group).any():
            group[further] = self._group[group[further]]
        self._group[members] = group
        return group

    def _join(self, one: int, other: int) -> bool:
        """Make one group of those of two hashes; False where it is one already."""
        one, other = self._root(one), self._root(other)
        self._leads_to[max(one, other)] = min(one, other)
        return one != other

    def _root(self, own: int) -> int:
        while (further := self._leads_to[own]) != own:
            self._leads_to[own] = own = self._leads_to[further]
        return own


def _bands(hashes: np.ndarray, count: int) -> np.ndarray:
    """The bits of each hash in ``count`` bands, each as one number: uint32 or uint64 ``(count, N)``.

    A band takes every ``count``-th bit, so it holds low and high frequencies: in one of high frequencies alone all
    plain pictures would agree, and have to be compared. Of a band wider than 64 bits the first 64 lose no pair.
    """
    number = np.dtype(np.uint32 if count * 32 >= HASH_BITS else np.uint64)
    values = np.zeros((count, len(hashes), number.itemsize), np.uint8)
    for start in range(0, len(hashes), ROWS_AT_ONCE):
        bits = np.unpackbits(hashes[start : start + ROWS_AT_ONCE], axis=1)
        for band in range(count):
            packed = np.packbits(bits[:, band::count][:, : 8 * number.itemsize], axis=1)
            values[band, start : start + len(packed), : packed.shape[1]] = packed
    return values.view(number)[..., 0]
