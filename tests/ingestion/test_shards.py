"""The shards of data/images: what others open, byte for byte the same, damaged files reported by name."""

import errno
import io
import json
import os
import resource
import signal
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentloom.errors import UserError, WriteError
from latentloom.ingestion import pngs, shards
from latentloom.ingestion.ingest import ingest
from latentloom.ingestion.pngs import decode, encode
from latentloom.ingestion.shard_writer import ImageRow, write_shards
from latentloom.ingestion.shards import (
    SCHEMA,
    NumberedImages,
    iterate_images,
    metadata_batches,
    read_manifest,
    read_metadata,
)
from latentloom.params import IngestParams

COLUMNS = ["id", "image", "captions", "split", "source", "key", "width", "height"]


@pytest.fixture
def filled(corpus):
    for number in range(7):
        corpus.add(f"{number}.png", f"picture {number}\nnumber {number}")
    return corpus


@pytest.fixture
def small_shards(shards_of):
    shards_of(3, group=2)


def test_shards_hold_a_bounded_number_of_rows_in_the_sources_order(filled, small_shards):
    filled.ingest()
    assert sorted(path.name for path in filled.images.iterdir()) == [
        "00000.parquet",
        "00001.parquet",
        "00002.parquet",
        "manifest.json",
    ]
    assert [shard["rows"] for shard in read_manifest(filled.images)["shards"]] == [3, 3, 1]
    assert pq.ParquetFile(filled.images / "00000.parquet").num_row_groups == 2
    assert read_metadata(filled.images)["key"].tolist() == [f"{number}.png" for number in range(7)]
    assert [own_id for own_id, _ in iterate_images(filled.images)] == read_metadata(filled.images)["id"].tolist()


def test_a_full_last_shard_is_followed_by_no_empty_one(filled, small_shards):
    filled.ingest(limit=6)
    assert [shard["rows"] for shard in read_manifest(filled.images)["shards"]] == [3, 3]


def shard_bytes(corpus) -> list[bytes]:
    return [path.read_bytes() for path in sorted(corpus.images.glob("*.parquet"))]


def test_images_that_come_after_all_others_leave_the_earlier_shards_byte_for_byte(corpus, shards_of):
    shards_of(2, typical=3)
    for number in range(30):
        corpus.add(f"{number:02}.png", "a picture")
    corpus.ingest()
    before = shard_bytes(corpus)
    for number in range(30, 40):
        corpus.add(f"{number:02}.png", "a picture")
    corpus.ingest()
    after = shard_bytes(corpus)
    assert len(after) > len(before) > 5
    assert after[: len(before) - 1] == before[:-1]


def test_a_folder_put_in_the_middle_leaves_all_shards_but_its_neighbours(corpus, shards_of):
    shards_of(2, typical=3, most=20)
    for folder in ("a", "c"):
        for number in range(40):
            corpus.add(f"{folder}/{number:02}.png", "a picture")
    corpus.ingest()
    before = shard_bytes(corpus)
    for number in range(25):
        corpus.add(f"b/{number:02}.png", "a picture")
    corpus.ingest()
    after = shard_bytes(corpus)
    unchanged = [shard for shard in before if shard in after]
    assert len(before) - len(unchanged) <= 3
    assert len(unchanged) > 8


def test_the_manifest_says_what_the_shards_hold(filled, small_shards):
    report = filled.ingest()
    manifest = read_manifest(filled.images)
    frame = read_metadata(filled.images)
    assert manifest["format_version"] == 2
    assert manifest["image_size"] == 32
    assert manifest["images"] == len(frame) == report.kept
    assert manifest["train"] == (frame["split"] == "train").sum() == report.train
    assert manifest["validation"] == (frame["split"] == "validation").sum() == report.validation
    assert (manifest["found"], manifest["rejected"]) == (7, 0)
    assert manifest["shards"] == [
        {"name": "00000.parquet", "rows": 3},
        {"name": "00001.parquet", "rows": 3},
        {"name": "00002.parquet", "rows": 1},
    ]
    assert manifest["attribution"] is None
    assert manifest["licence"] is None


@pytest.fixture
def every_file(corpus, picture):
    """An ingestion with kept and rejected images and near duplicates."""
    for number in range(7):
        corpus.add(f"{number}.png", f"picture {number}\nnumber {number}", picture(number))
    nearly = picture(0)
    nearly[0, 0] ^= 1
    corpus.add("near.png", "nearly picture 0", nearly)
    corpus.add("bare.png")
    corpus.add("empty.png", "nothing", b"")
    corpus.ingest(near_duplicate_distance=8)
    return corpus


def test_pandas_opens_every_file(every_file):
    images = pd.concat(map(pd.read_parquet, sorted(every_file.images.glob("*.parquet"))))
    assert list(images) == COLUMNS
    assert (images["width"].dtype, images["height"].dtype) == (np.int32, np.int32)
    image = images["image"].iloc[0]
    assert image["path"] == f"{images['id'].iloc[0]}.png"
    assert Image.open(io.BytesIO(image["bytes"])).format == "PNG"
    assert list(images["captions"].iloc[0]) == ["picture 0", "number 0"]
    rejects, pairs = pd.read_parquet(every_file.rejects), pd.read_parquet(every_file.near_duplicates)
    assert dict(zip(images["key"], images["id"], strict=True)) == every_file.ids()
    assert rejects["key"].tolist() == ["bare.png", "empty.png"]
    assert rejects["preview"].notna().tolist() == [True, False]
    ids = every_file.ids()
    assert pairs[["image_id", "twin_id"]].to_numpy().tolist() == [sorted((ids["0.png"], ids["near.png"]))]


def test_duckdb_opens_every_file(every_file):
    def query(sql: str, path: Path) -> list[tuple]:
        return duckdb.execute(sql, [str(path)]).fetchall()

    images = query("SELECT key, captions, image.bytes, split FROM read_parquet($1)", every_file.images / "*.parquet")
    captions, pixels = every_file.captions(), every_file.pixels()
    assert len(images) == 8
    for key, of_image, png, split in images:
        assert of_image == captions[key]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels[key])
        assert split in ("train", "validation")
    rejects = query("SELECT source, key, reason, preview IS NULL FROM read_parquet($1)", every_file.rejects)
    assert rejects == [
        ("folder", "bare.png", "no_caption", False),
        ("folder", "empty.png", "empty_file", True),
    ]
    pairs = query("SELECT image_id, twin_id, distance FROM read_parquet($1)", every_file.near_duplicates)
    assert [tuple(row) for row in pd.read_parquet(every_file.near_duplicates).to_numpy()] == pairs
    assert len(pairs) == 1


def test_hugging_face_datasets_opens_the_shards_with_decoded_pictures(filled, small_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    filled.ingest()
    files = sorted(map(str, filled.images.glob("*.parquet")))
    opened = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert isinstance(opened.features["image"], datasets.Image)
    pixels = filled.pixels()
    assert len(opened) == 7
    for row in opened:
        assert np.array_equal(np.asarray(row["image"]), pixels[row["key"]])
        assert row["captions"] == filled.captions()[row["key"]]


def test_the_schema_is_what_hugging_face_datasets_itself_would_write():
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "id": text,
            "image": datasets.Image(),
            "captions": datasets.List(text),
            "split": text,
            "source": text,
            "key": text,
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
        }
    )
    assert SCHEMA.equals(features.arrow_schema)
    assert json.loads(SCHEMA.metadata[b"huggingface"]) == json.loads(features.arrow_schema.metadata[b"huggingface"])


def test_pixels_come_back_as_they_went_in(picture):
    assert np.array_equal(decode(encode(picture(0, 24, 40))), picture(0, 24, 40))
    assert decode(encode(picture(0))).flags.writeable
    with pytest.raises(ValueError, match="not a whole PNG"):
        decode(encode(picture(0))[:300])


def test_a_shard_whose_end_cannot_be_written_is_named_while_the_next_is_begun(filled, small_shards, monkeypatch):
    flush, flushed = os.fsync, []

    def full(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError) as raised:
        filled.ingest()
    assert str(raised.value).startswith(f"could not write {filled.images / '00000.parquet'}: No space left on device; ")
    assert str(raised.value).count("could not write") == 1
    assert not list(filled.images.glob(".*")) and not (filled.images / "manifest.json").exists()


def test_no_row_group_is_written_to_a_shard_that_an_error_closes(filled, shards_of, monkeypatch):
    shards_of(100, group=1)
    writing, write = [], pq.ParquetWriter.write_table

    def slowly(writer: pq.ParquetWriter, table: pa.Table) -> None:
        assert writer.is_open
        time.sleep(0.05)
        write(writer, table)
        writing.append(table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", slowly)

    def rows():
        for number in range(4):
            png = encode(np.full((8, 8, 3), number, np.uint8))
            yield ImageRow(f"{number:064}", png, ["a picture"], "train", "folder", str(number), 8, 8)
        raise RuntimeError("of the source")

    with pytest.raises(RuntimeError, match="of the source"):
        write_shards(rows(), filled.images)
    assert len(writing) == 4
    assert not list(filled.images.iterdir())


def test_metadata_is_read_without_the_pictures(filled, small_shards, monkeypatch):
    filled.ingest()
    monkeypatch.setattr(pngs, "decode", None)
    frame = read_metadata(filled.images)
    assert list(frame) == ["id", "captions", "split", "key", "source", "width", "height"]
    assert frame["captions"][3] == ["picture 3", "number 3"]
    monkeypatch.setattr(shards, "BATCH_ROWS", 2)
    batches = list(metadata_batches(filled.images, ["captions", "id"]))
    assert [batch.schema.names for batch in batches] == [["captions", "id"]] * len(batches)
    assert [len(batch) for batch in batches] == [2, 1, 2, 1, 1]
    assert pa.Table.from_batches(batches).to_pylist() == frame[["captions", "id"]].to_dict("records")


def test_only_wanted_images_are_decoded(filled, small_shards, monkeypatch):
    filled.ingest()
    ids = read_metadata(filled.images)["id"].tolist()
    decoded = []
    monkeypatch.setattr(pngs, "decode", lambda png: decoded.append(png) or decode(png))
    assert [own_id for own_id, _ in iterate_images(filled.images, wanted={ids[5], ids[1]})] == [ids[1], ids[5]]
    assert len(decoded) == 2
    assert list(iterate_images(filled.images, wanted=set())) == []


def test_images_are_read_by_their_numbers_in_any_order_from_the_shards_that_hold_them(filled, small_shards):
    filled.ingest()
    pixels, images = [own for _, own in iterate_images(filled.images)], NumberedImages(filled.images)
    for numbers in ([0, 1, 2, 3, 4, 5, 6], [6, 4, 5, 0, 0], [2], []):
        read = list(images.read(np.array(numbers, int)))
        assert len(read) == len(numbers)
        assert all(np.array_equal(own, pixels[number]) for own, number in zip(read, numbers, strict=True))
    assert images.files(np.array([6, 1, 0])) == [filled.images / "00000.parquet", filled.images / "00002.parquet"]


def test_a_missing_manifest_or_shard_is_reported_by_name(filled):
    with pytest.raises(UserError, match=r"manifest\.json.*dvc repro"):
        read_metadata(filled.images)
    filled.ingest()
    (filled.images / "00000.parquet").unlink()
    for read in (read_metadata, lambda folder: list(iterate_images(folder))):
        with pytest.raises(UserError, match=r"00000\.parquet.*dvc repro"):
            read(filled.images)


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["cut", "flipped", "not parquet", "empty", "other rows"])
def test_a_damaged_shard_is_reported_by_name(filled, damage):
    filled.ingest()
    path = filled.images / "00000.parquet"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 3] ^= 1
    elif damage == "not parquet":
        data = bytearray(b"<html>" * 100)
    elif damage == "empty":
        data = bytearray()
    else:
        filled.ingest(limit=3)
        data = bytearray(path.read_bytes())
        filled.ingest()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.parquet.*dvc repro"):
        list(iterate_images(filled.images))


def test_a_manifest_of_another_format_is_rejected(filled):
    filled.ingest()
    manifest = read_manifest(filled.images)
    (filled.images / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        read_metadata(filled.images)
    (filled.images / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        read_metadata(filled.images)


def ingest_under_a_limit(params: IngestParams, out: Path, limit: int, outcome: Connection) -> None:
    """Ingest in a process of its own in which no file grows beyond ``limit`` bytes (0: any may); send what is said."""
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        ingest(params, out / "images", out / "rejects.parquet", out / "near_duplicates.parquet", progress=False)
        outcome.send("")
    except OSError as error:
        outcome.send(str(error))


@pytest.mark.fault
def test_a_full_disk_is_reported_with_the_file_and_the_room_and_a_rerun_with_room_ends_well(corpus, contents, tmp_path):
    for number in range(200):
        corpus.add(f"{number:03}.png", "a picture")
    out = tmp_path / "full"
    out.mkdir()

    def run(limit: int) -> str:
        context = get_context("fork")
        outcome, inner = context.Pipe()
        process = context.Process(target=ingest_under_a_limit, args=(corpus.params(), out, limit, inner))
        process.start()
        assert outcome.poll(60)
        process.join(60)
        return outcome.recv()

    failed = run(limit=200_000)
    assert f"could not write {out}/images/00000.parquet: " in failed
    assert "it needs " in failed
    assert "Make room and run the stage again" in failed
    assert contents(out) == {}
    assert run(limit=0) == ""
    corpus.ingest()
    assert contents(out) == contents(corpus.out)
