"""Near duplicates: every pair is found, and none of them lies astride the two splits."""

import itertools

import imagehash
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentloom.ingestion.near_duplicates import find_near_duplicates, perceptual_hash
from latentloom.ingestion.shards import read_manifest, read_metadata
from latentloom.ingestion.splits import linked_to_train, split_of

HASH = st.binary(min_size=32, max_size=32)


def differing_bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def by_brute_force(hashes: list[bytes], distance: int) -> set[tuple[int, int, int]]:
    """All pairs of the first of each kind, and each other hash with the first of its kind."""
    first = {value: hashes.index(value) for value in hashes}
    pairs = {(first[value], position, 0) for position, value in enumerate(hashes) if first[value] != position}
    for one, other in itertools.combinations(sorted(first.values()), 2):
        if (differing := differing_bits(hashes[one], hashes[other])) <= distance:
            pairs.add((one, other, differing))
    return pairs


def found(hashes: list[bytes], distance: int) -> list[tuple[int, int, int]]:
    pairs = find_near_duplicates(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32), distance)
    return list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.distance.tolist(), strict=True))


@st.composite
def families(draw) -> list[bytes]:
    """Hashes, and others that differ from an earlier one in a few bits."""
    hashes = draw(st.lists(HASH, min_size=1, max_size=6))
    for _ in range(draw(st.integers(0, 25))):
        value = bytearray(draw(st.sampled_from(hashes)))
        for bit in draw(st.lists(st.integers(0, 255), max_size=12)):
            value[bit // 8] ^= 1 << bit % 8
        hashes.append(bytes(value))
    return draw(st.permutations(hashes))


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
        assert (0, 1, distance) in found([base.tobytes(), np.packbits(bits).tobytes()], distance)
        assert found([base.tobytes(), np.packbits(beyond).tobytes()], distance) == []


def test_many_equal_hashes_make_one_pair_each():
    assert found([b"\0" * 32] * 3000, 8) == [(0, position, 0) for position in range(1, 3000)]


def test_no_hashes_or_one_make_no_pairs():
    assert found([], 8) == found([b"\0" * 32], 8) == []


def test_the_hash_is_that_of_the_library(picture):
    pixels = np.asarray(Image.fromarray(picture(0, 4, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    theirs = imagehash.phash(Image.fromarray(pixels), hash_size=16)
    assert perceptual_hash(pixels).hex() == str(theirs)


@given(families(), st.lists(st.booleans(), min_size=31, max_size=31))
@settings(max_examples=50, deadline=None)
def test_chains_of_near_duplicates_that_touch_the_training_split_follow_in_whole(hashes, in_train):
    in_train = in_train[: len(hashes)]
    pairs = find_near_duplicates(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32), 5)
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
