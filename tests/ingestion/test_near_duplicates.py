"""Near duplicates: every pair is found, colours set pictures apart, and no pair lies astride the two splits."""

import io
import itertools
import tracemalloc

import imagehash
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from latentloom.ingestion.near_duplicates import _cielab, find_near_duplicates, signature
from latentloom.ingestion.openmoji import OpenMojiSource, render
from latentloom.ingestion.shards import read_manifest, read_metadata
from latentloom.ingestion.splits import linked_to_train, split_of

HASH = st.binary(min_size=32, max_size=32)
GREY, GREEN, BLUE = (bytes(colour) * 64 for colour in ((128, 128, 128), (0, 160, 0), (0, 0, 160)))
GREEN_BUT_FOR_A_PART = bytes((0, 160, 0)) * 63 + bytes((0, 0, 160))
LIGHTER_GREEN = bytes((0, 180, 0)) * 64


def differing_bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one[:32]) ^ int.from_bytes(other[:32])).bit_count()


def by_brute_force(signatures: list[bytes], distance: int) -> set[tuple[int, int, int]]:
    """All pairs of the first of each kind, and each other signature with the first of its kind."""
    first = {value: signatures.index(value) for value in signatures}
    pairs = {(first[value], position, 0) for position, value in enumerate(signatures) if first[value] != position}
    alike = {GREEN, LIGHTER_GREEN}
    for one, other in itertools.combinations(sorted(first.values()), 2):
        colours = {signatures[one][32:], signatures[other][32:]}
        differing = differing_bits(signatures[one], signatures[other])
        if differing <= distance and (len(colours) == 1 or colours == alike):
            pairs.add((one, other, differing))
    return pairs


def find(signatures: list[bytes], distance: int):
    return find_near_duplicates(np.frombuffer(b"".join(signatures), np.uint8).reshape(-1, 224), distance)


def found(signatures: list[bytes], distance: int) -> list[tuple[int, int, int]]:
    pairs = find(signatures, distance)
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.distance.tolist(), strict=True))


@st.composite
def families(draw) -> list[bytes]:
    """Signatures: hashes, and others that differ from an earlier one in a few bits, in a few colours."""
    hashes = draw(st.lists(HASH, min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 25))):
        value = bytearray(draw(st.sampled_from(hashes)))
        for bit in draw(st.lists(st.integers(0, 255), max_size=12)):
            value[bit // 8] ^= 1 << bit % 8
        hashes.append(bytes(value))
    colours = st.sampled_from([GREEN, BLUE, GREEN_BUT_FOR_A_PART, LIGHTER_GREEN])
    return [value + draw(colours) for value in draw(st.permutations(hashes))]


def test_to_find_pairs_takes_less_than_twice_the_memory_of_the_signatures():
    """Ten million of them are 2.2 GB already: a float for each of their bytes would be four times that."""
    signatures = np.random.default_rng(0).integers(0, 256, (20_000, 224), np.uint8)
    tracemalloc.start()
    try:
        find_near_duplicates(signatures, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * signatures.nbytes


@pytest.mark.slow
@given(families(), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_the_pairs_are_those_of_comparing_all_with_all(hashes, distance):
    pairs = found(hashes, distance)
    assert pairs == sorted(set(pairs))
    assert set(pairs) == by_brute_force(hashes, distance)


@pytest.mark.parametrize("distance", [0, 1, 8, 31, 64])
def test_no_pair_at_the_very_distance_is_missed_however_its_bits_lie(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 256, 32, dtype=np.uint8)
    for places in (np.arange(distance), 255 - np.arange(distance), *(rng.permutation(256) for _ in range(20))):
        bits = np.unpackbits(base)
        bits[places[:distance]] ^= 1
        beyond = bits.copy()
        beyond[np.setdiff1d(np.arange(256), places[:distance])[0]] ^= 1
        own, within, without = (value.tobytes() + GREY for value in (base, np.packbits(bits), np.packbits(beyond)))
        assert (0, 1, distance) in found([own, within], distance)
        assert found([own, without], distance) == []


def test_many_equal_signatures_make_one_pair_each():
    assert found([bytes(32) + GREY] * 3000, 8) == [(0, position, 0) for position in range(1, 3000)]


def test_of_a_crowd_the_groups_are_those_of_all_pairs_and_only_links_are_listed(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 256, (4, 32), dtype=np.uint8)
    centres[:, :] = centres[0]
    centres[:, 20:24] = rng.integers(0, 256, (4, 4))  # four layouts that share most bands' values
    bits = np.unpackbits(centres[rng.integers(0, 4, 400)], axis=1)
    for _ in range(2):
        bits[np.arange(400), rng.integers(0, 256, 400)] ^= 1
    signatures = np.concatenate([np.packbits(bits, axis=1), np.full((400, 192), 128, np.uint8)], axis=1)
    every = find_near_duplicates(signatures, 8)
    monkeypatch.setattr("latentloom.ingestion.near_duplicates.CROWD", 20)
    links = find_near_duplicates(signatures, 8)
    assert every.crowded == 0
    assert links.crowded > 390
    assert len(links) < len(every) / 10
    all_pairs = set(zip(every.first.tolist(), every.second.tolist(), every.distance.tolist(), strict=True))
    assert all_pairs.issuperset(zip(links.first.tolist(), links.second.tolist(), links.distance.tolist(), strict=True))
    for own in range(0, 400, 40):  # whichever image trains, the same ones follow it
        is_train = np.arange(400) == own
        assert linked_to_train(links, is_train).tolist() == linked_to_train(every, is_train).tolist()


def test_no_signatures_or_one_make_no_pairs():
    assert found([], 8) == found([bytes(32) + GREY], 8) == []


def test_the_hash_is_that_of_the_library(picture):
    pixels = np.asarray(Image.fromarray(picture(0, 4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    theirs = imagehash.phash(Image.fromarray(pixels), hash_size=16)
    assert signature(pixels)[:32].hex() == str(theirs)


def test_the_colours_are_the_means_of_8x8_parts(picture):
    pixels = np.asarray(Image.fromarray(picture(0, 4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    colours = np.frombuffer(signature(pixels)[32:], np.uint8).reshape(8, 8, 3)
    assert abs(colours - pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))).max() <= 1


# CIELAB of colours on a grey scale and of the primaries, by Bruce Lindbloom's calculator (D65, no adaptation).
@pytest.mark.parametrize(
    ("srgb", "lab"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((119, 119, 119), (50.03, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_colours_are_compared_in_cielab(srgb, lab):
    np.testing.assert_allclose(_cielab(np.array(srgb, np.float32)), lab, atol=0.1)


def square(colour: tuple[int, int, int], size: int = 96) -> np.ndarray:
    picture = np.full((size, size, 3), 255, np.uint8)
    picture[size // 4 : -size // 4, size // 4 : -size // 4] = colour
    return picture


def photographs(count: int) -> list[np.ndarray]:
    """Squares of 120 to 300 pixels out of real photographs, scaled to 96."""
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    squares = []
    for number in range(count):
        photo, side = whole[number % 2], int(rng.integers(120, 300))
        left, top = (int(rng.integers(0, length - side)) for length in photo.size)
        squares.append(photo.resize((96, 96), Image.Resampling.LANCZOS, (left, top, left + side, top + side)))
    return [np.asarray(square) for square in squares]


def jpeg(pixels: np.ndarray, quality: int, size: int) -> np.ndarray:
    """Saved as JPEG at another size, and brought back to its own."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).resize(pixels.shape[:2], Image.Resampling.LANCZOS))


def test_squares_of_other_colours_are_no_near_duplicates():
    signatures = [signature(square(colour)) for colour in ((0, 128, 0), (0, 90, 240), (97, 97, 97))]
    assert len({own[:32] for own in signatures}) == 1
    assert found(signatures, 8) == []


def test_black_and_white_are_no_near_duplicates():
    assert found([signature(np.full((64, 64, 3), value, np.uint8)) for value in (0, 128, 255)], 8) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: jpeg(pixels, 90, 96),
        lambda pixels: jpeg(pixels, 50, 96),
        lambda pixels: jpeg(pixels, 90, 64),
        lambda pixels: jpeg(pixels, 75, 192),
        lambda pixels: (pixels * 0.9).astype(np.uint8),
    ],
    ids=["JPEG", "poor JPEG", "smaller", "larger", "darker"],
)
def test_photographs_that_were_changed_a_little_are_near_duplicates_of_themselves_alone(change):
    originals = photographs(40)
    signatures = [signature(own) for own in [*originals, *map(change, originals)]]
    assert [(one, other) for one, other, _ in found(signatures, 8)] == [(number, number + 40) for number in range(40)]


def test_a_photograph_whose_colours_are_swapped_is_no_near_duplicate():
    originals = photographs(40)
    greys = [own @ [0.299, 0.587, 0.114] for own in originals]
    swapped = [
        own[..., ::-1] * (grey / (own[..., ::-1] @ [0.299, 0.587, 0.114] + 1))[..., None]
        for own, grey in zip(originals, greys, strict=True)
    ]
    signatures = [signature(np.clip(own, 0, 255).astype(np.uint8)) for own in [*originals, *swapped]]
    assert len(found([own[:32] + GREY for own in signatures], 8)) > 30
    assert found(signatures, 8) == []


@pytest.mark.slow
def test_an_emoji_in_two_skin_tones_is_no_near_duplicate_unless_the_skin_is_hardly_seen():
    keys = list(OpenMojiSource(128, skin_tones=60).captions)[: 60 * 6]
    pictures = [np.asarray(Image.open(io.BytesIO(render(key, 128))).convert("RGB")) for key in keys]
    signatures = [signature(own) for own in pictures]
    family = [number // 6 for number in range(len(keys))]
    by_hash_alone = found([own[:32] + GREY for own in signatures], 8)
    within = [pair for pair in by_hash_alone if family[pair[0]] == family[pair[1]]]
    assert len(within) > 60
    assert not [pair for pair in found(signatures, 8) if family[pair[0]] == family[pair[1]]]


@given(families(), st.lists(st.booleans(), min_size=31, max_size=31))
@settings(max_examples=50, deadline=None)
def test_chains_of_near_duplicates_that_touch_the_training_split_follow_in_whole(hashes, in_train):
    in_train = in_train[: len(hashes)]
    pairs = find(hashes, 5)
    reached = {position for position, is_train in enumerate(in_train) if is_train}
    links = list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    for _ in hashes:  # plain spreading, link by link
        reached |= {b for a, b in links if a in reached} | {a for a, b in links if b in reached}
    moved = linked_to_train(pairs, np.array(in_train))
    assert set(moved.tolist()) == {position for position in reached if not in_train[position]}


def blotches(picture, seed: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture(seed, 24, 24)).resize((96, 96), Image.Resampling.BICUBIC))


@pytest.fixture
def alike(corpus, picture):
    """Forty pictures, of which the first twenty come again a little darker."""
    for number in range(40):
        corpus.add(f"a{number:02}.png", "a picture", blotches(picture, number))
    for number in range(20):
        corpus.add(f"b{number:02}.png", "a near duplicate", (blotches(picture, number) * 0.97).astype(np.uint8))
    return corpus


def test_near_duplicates_are_reported_and_share_a_split(alike):
    report = alike.ingest(near_duplicate_distance=8)
    ids, frame = alike.ids(), read_metadata(alike.images)
    pairs = pd.read_parquet(alike.near_duplicates)
    assert list(pairs) == ["image_id", "twin_id", "distance"]
    assert pairs["distance"].dtype == np.int32
    expected = {tuple(sorted((ids[f"a{number:02}.png"], ids[f"b{number:02}.png"]))) for number in range(20)}
    found = list(zip(pairs["image_id"], pairs["twin_id"], strict=True))
    assert set(found) == expected
    assert found == sorted(found)
    assert pairs["distance"].between(0, 8).all()
    split = dict(zip(frame["id"], frame["split"], strict=True))
    assert all(split[one] == split[other] for one, other in found)
    moved = {own_id for own_id in split if split[own_id] != split_of(own_id, 0.5)}
    assert moved
    assert all(split[own_id] == "train" for own_id in moved)
    assert (report.near_duplicates, report.moved_to_train) == (20, len(moved))
    assert report.validation == list(split.values()).count("validation") == read_manifest(alike.images)["validation"]


def test_null_looks_for_none(alike):
    report = alike.ingest(near_duplicate_distance=None)
    assert (report.near_duplicates, report.moved_to_train) == (0, 0)
    empty = pd.read_parquet(alike.near_duplicates)
    assert (list(empty), len(empty)) == (["image_id", "twin_id", "distance"], 0)
    frame = read_metadata(alike.images)
    assert frame["split"].tolist() == [split_of(own_id, 0.5) for own_id in frame["id"]]


def test_shards_with_moved_images_are_as_if_written_so_at_first(alike, contents, shards_of, monkeypatch, tmp_path):
    shards_of(4, typical=4, group=3)
    assert alike.ingest(near_duplicate_distance=8).moved_to_train > 3
    frame = read_metadata(alike.images)
    split = dict(zip(frame["id"], frame["split"], strict=True))
    first = contents(alike.images)
    alike.out = tmp_path / "known from the start"
    monkeypatch.setattr("latentloom.ingestion.preprocess.split_of", lambda own_id, _: split[own_id])
    report = alike.ingest(near_duplicate_distance=8)
    assert report.moved_to_train == 0
    assert contents(alike.images) == first


def test_the_splits_and_the_pairs_do_not_depend_on_the_order_of_the_images(alike, tmp_path):
    assert alike.ingest(near_duplicate_distance=8).moved_to_train
    split = read_metadata(alike.images).set_index("id")["split"].sort_index()
    pairs = alike.near_duplicates.read_bytes()
    for number, path in enumerate(sorted(alike.path.glob("*.png"))):
        for file in (path, path.with_suffix(".txt")):
            file.rename(file.with_name(f"{number * 7919 % 997:03}{file.suffix}"))
    alike.out = tmp_path / "in another order"
    alike.ingest(near_duplicate_distance=8)
    assert read_metadata(alike.images).set_index("id")["split"].sort_index().equals(split)
    assert alike.near_duplicates.read_bytes() == pairs
