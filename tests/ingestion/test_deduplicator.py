"""What is kept, rejected and joined is what a plain dict of ids would do, and ids that collide are told apart."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentloom.ingestion import growing, rejects
from latentloom.ingestion.deduplicator import Deduplicator
from latentloom.ingestion.pngs import encode
from latentloom.ingestion.rejects import SCHEMA, Reason, Reject, RejectTable
from latentloom.ingestion.shard_writer import ImageRow, SourceCount

PNG = encode(np.zeros((2, 2, 3), np.uint8))
SOURCES = ("photos", "table")  # the second joins captions


def row(picture: int, source: str, key: str, captions: list[str], file: int) -> ImageRow:
    own_id = hashlib.sha256(bytes([picture])).hexdigest()
    hashed = hashlib.sha256(bytes([file])).digest()
    return ImageRow(own_id, PNG, captions, "train", source, key, 2, 2, signature=bytes(224), file_hash=hashed)


ROWS = st.builds(
    row,
    st.integers(0, 9),
    st.sampled_from(SOURCES),
    st.text(max_size=3),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3),
    st.integers(0, 2),
)
REJECTS = st.builds(Reject, st.sampled_from(SOURCES), st.text(max_size=3), st.just(Reason.TRUNCATED), st.just("ends"))


@given(st.lists(ROWS | REJECTS, max_size=60), st.none() | st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_stream_is_kept_rejected_and_joined_as_by_a_plain_dict(stream, limit):
    counts = {name: SourceCount(name, "folder", 1.0, None, None) for name in SOURCES}
    deduplicator = Deduplicator(counts, {"table"})
    kept = list(deduplicator.kept(stream, limit))
    firsts: dict[str, ImageRow] = {}
    rejected, joined = [], {}
    for result in stream:
        first = None if isinstance(result, Reject) else firsts.get(result.id)
        own = result.source, getattr(result, "file_hash", b"")
        if first and result.source == "table" and own == (first.source, first.file_hash):
            texts = joined.setdefault(list(firsts).index(result.id), [])
            texts += [caption for caption in result.captions if caption not in texts]
            continue
        if len(firsts) == limit:
            break
        if isinstance(result, Reject):
            rejected.append((result.source, result.key, "truncated", "ends"))
        elif first:
            detail = f"the same picture as {first.key} of {first.source}"
            rejected.append((result.source, result.key, "duplicate", detail))
        else:
            firsts[result.id] = result
    assert kept == list(firsts.values())
    assert [own.tobytes().hex() for own in deduplicator.ids()] == list(firsts)
    gained = deduplicator.joined_captions.by_rows()
    assert [gained(range(place, place + 1)) for place in range(len(firsts))] == [
        [joined[place]] if place in joined else [] for place in range(len(firsts))
    ]
    assert {name: (count.found, count.kept, count.rejected) for name, count in counts.items()} == {
        name: (own_kept + own_rejected, own_kept, own_rejected)
        for name in SOURCES
        for own_kept in [sum(own.source == name for own in firsts.values())]
        for own_rejected in [sum(own[0] == name for own in rejected)]
    }
    assert (len(deduplicator.rejects), sum(deduplicator.rejects.reasons().values())) == (len(rejected),) * 2


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40)), max_size=60))
@settings(deadline=None)
def test_ids_that_begin_alike_are_told_apart_through_every_resize(numbers):
    growing_ids, places = growing.Ids(), {}
    growing_ids._resize(2)
    for slot, rest in numbers:  # nearly all start their search at the last slots, so that they go round the end
        own_id = (2**64 - 1 - slot % 2).to_bytes(8) + bytes([rest]) * 24
        assert growing_ids.find(own_id) == places.get(own_id)
        if own_id not in places:
            growing_ids.add(own_id)
            places[own_id] = len(places)
    assert [growing_ids.find(own_id) for own_id in places] == list(places.values())
    assert [own.tobytes() for own in growing_ids.array()] == list(places)


@pytest.mark.parametrize("count", [0, 3, 8, 20])
def test_the_file_of_rejects_is_that_of_one_table_written_at_once(tmp_path, monkeypatch, count):
    monkeypatch.setattr(rejects, "BATCH_ROWS", 2)
    monkeypatch.setattr(rejects, "ROW_GROUP_ROWS", 8)
    rows = [Reject("photos", f"{number}.jpg", Reason.TRUNCATED, "ends", b"png") for number in range(count)]
    table = RejectTable()
    for own in rows:
        table.add(own)
    table.write(tmp_path / "rejects.parquet")
    columns = {name: [getattr(own, name) for own in rows] for name in SCHEMA.names}
    pq.write_table(pa.table(columns, SCHEMA), tmp_path / "at once", compression="zstd", row_group_size=8)
    assert (tmp_path / "rejects.parquet").read_bytes() == (tmp_path / "at once").read_bytes()
