"""Parquet tables of images and captions, whoever wrote them."""

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outcomes import Outcome, outcomes
from PIL import Image

from latentloom.ingestion.captions import CAPTION_COLUMNS
from latentloom.ingestion.parquet import ParquetSource
from latentloom.ingestion.rejects import Reason
from latentloom.ingestion.sources import IngestError
from latentloom.ingestion.table_columns import IMAGE_COLUMNS


def read(path) -> list[Outcome]:
    return list(outcomes(ParquetSource(path)))


def samples(path) -> list[Outcome]:
    items = read(path)
    assert not any(item.reason for item in items)
    return items


def write(path, table, **options):
    pq.write_table(pa.table(table) if isinstance(table, dict) else table, path, **options)
    return path


def test_what_hugging_face_datasets_writes_is_read(corpus, picture, tmp_path):
    pictures = [Image.fromarray(picture(seed)) for seed in range(3)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict({"image": pictures, "text": ["one", "two", "three"]}, features)
    data.to_parquet(tmp_path / "train.parquet")
    corpus.ingest(source="parquet", path=str(tmp_path / "train.parquet"))
    assert corpus.captions() == {f"train.parquet:{row}": [text] for row, text in enumerate(["one", "two", "three"])}
    assert all(np.array_equal(corpus.pixels()[f"train.parquet:{row}"], picture(row)) for row in range(3))


def test_a_table_without_rows_is_told_in_plain_words(corpus, tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    with pytest.raises(IngestError, match=r"hold no samples: look at ingest\.source"):
        corpus.ingest(source="parquet", path=str(path))


def test_prepared_images_are_a_source_themselves(corpus, new_corpus):
    for number in range(5):
        corpus.add(f"{number}.png", f"picture {number}\nagain {number}")
    corpus.ingest()
    other = new_corpus("other")
    other.ingest(source="parquet", path=str(corpus.images))
    assert list(other.ids().values()) == list(corpus.ids().values())
    assert list(other.captions().values()) == list(corpus.captions().values())


@pytest.mark.parametrize("image_type", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize(
    "caption_type",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()],
)
def test_bytes_and_texts_of_any_arrow_type_are_read(tmp_path, image_type, caption_type):
    texts = pa.array(["café", "two", "two"], pa.string() if caption_type == pa.binary() else caption_type)
    table = {"jpg": pa.array([b"a", b"b", b"c"], image_type), "txt": texts.cast(caption_type)}
    found = samples(write(tmp_path / "a.parquet", table))
    assert [sample.data for sample in found] == [b"a", b"b", b"c"]
    assert [sample.captions for sample in found] == [["café"], ["two"], ["two"]]


def test_dictionaries_of_images_are_read(tmp_path):
    images = pa.array([b"a", b"b", b"a"]).dictionary_encode()
    found = samples(write(tmp_path / "a.parquet", {"image": images, "text": ["x", "y", "z"]}))
    assert [sample.data for sample in found] == [b"a", b"b", b"a"]


@pytest.mark.parametrize("list_type", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_a_caption_column_may_hold_lists(tmp_path, list_type):
    lists = pa.array([["one", "two"], [], None, [None, "three"], [None]], list_type)
    found = samples(write(tmp_path / "a.parquet", {"image": [b"x"] * 5, "captions": lists}))
    assert [sample.captions for sample in found] == [["one", "two"], [], [], ["three"], []]


def test_all_columns_of_captions_are_taken_and_that_is_said_or_those_that_are_named(tmp_path):
    table = {"image": [b"x"], "Prompt": ["three"], "text": ["one"], "captions": [["two"]]}
    source = ParquetSource(write(tmp_path / "a.parquet", table))
    assert [item.captions for item in outcomes(source)] == [["one", "two", "three"]]
    assert source.notices() == [
        "the captions of a.parquet are those of all of its columns text, captions, Prompt; caption_column chooses"
    ]
    named = ParquetSource(tmp_path, caption_columns={"captions": 1, "text": 1})
    assert [item.captions for item in outcomes(named)] == [["two", "one"]]
    assert named.notices() == []


def test_a_column_that_comes_twice_is_an_error_that_names_it(tmp_path):
    image, text = pa.array([b"x"]), pa.array(["y"])
    for names in (["image", "image", "text"], ["image", "text", "text"]):
        arrays = [image if name == "image" else text for name in names]
        path = write(tmp_path / "a.parquet", pa.Table.from_arrays(arrays, names))
        with pytest.raises(IngestError, match=rf"a\.parquet has two columns '{names[1]}'; rename one"):
            ParquetSource(path)


def test_a_row_group_of_large_images_is_read_in_smaller_batches(tmp_path, monkeypatch):
    # Arrow cannot hold more than 2 GiB of a struct's bytes in one batch.
    images = pa.array([{"bytes": bytes([row]) * 1000, "path": None} for row in range(40)])
    path = write(tmp_path / "a.parquet", {"image": images, "text": ["x"] * 40}, compression="NONE")
    asked = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda file, rows, **more: asked.append(rows) or iter_batches(file, rows, **more),
    )
    for limit in (2**28, 5000, 10):
        monkeypatch.setattr("latentloom.ingestion.parquet.BATCH_BYTES", limit)
        assert [item.data[0] for item in samples(path)] == list(range(40))
    assert asked[0] == 16
    assert 3 <= asked[1] <= 5
    assert asked[2] == 1


def test_columns_are_found_by_their_usual_names_in_any_case(tmp_path):
    for image in IMAGE_COLUMNS:
        assert samples(write(tmp_path / "a.parquet", {"id": [1], image.upper(): [b"x"], "TEXT": ["y"]}))
    for caption in CAPTION_COLUMNS:
        (sample,) = samples(write(tmp_path / "a.parquet", {"id": [1], "image": [b"x"], caption.title(): ["y"]}))
        assert sample.captions == ["y"]


def test_a_column_of_paths_is_skipped_for_one_of_bytes(tmp_path):
    (sample,) = samples(write(tmp_path / "a.parquet", {"image": ["a.jpg"], "bytes": [b"x"], "caption": ["y"]}))
    assert sample.data == b"x"


def test_params_may_name_the_columns(corpus, picture, tmp_path):
    corpus.add("a.png")
    data = (corpus.path / "a.png").read_bytes()
    table = {"image": [b"not this"], "photo": [data], "text": ["not this"], "alt": ["this"]}
    entry = {"source": "parquet", "path": str(write(tmp_path / "a.parquet", table))}
    corpus.ingest(source=[entry | {"image_column": "photo", "caption_column": "alt"}], path=None)
    assert corpus.captions() == {"a.parquet:0": ["this"]}
    assert np.array_equal(corpus.pixels()["a.parquet:0"], picture(1))


@pytest.mark.parametrize(
    ("columns", "named", "says"),
    [
        ({"picture_id": [1], "text": ["x"]}, (), ["picture_id (int64), text (string)", "image_column: ..."]),
        ({"image": ["a.jpg"], "text": ["x"]}, (), ["image (string)", "image_column: ..."]),
        ({"image": [b"x"], "label": [3]}, (), ["label (int64)", "caption_column: ...", "text, caption, captions"]),
        ({"image": [b"x"], "text": ["x"]}, ("photo", None), ["called photo", "image_column: ..."]),
        ({"image": [b"x"], "text": ["x"]}, (None, {"alt": 1}), ["called alt", "caption_column: ..."]),
    ],
)
def test_a_missing_column_is_an_error_that_names_file_columns_and_param(tmp_path, columns, named, says):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(IngestError) as caught:
        ParquetSource(tmp_path, *named)
    for text in (str(path), "params.yaml", *says):
        assert text in str(caught.value)


def test_without_a_file_the_error_names_the_path(tmp_path):
    for path, what in ((tmp_path, "holds no file"), (tmp_path / "x*", "holds no file"), (tmp_path / "x", "not exist")):
        with pytest.raises(IngestError, match=what) as caught:
            ParquetSource(path)
        assert str(path) in str(caught.value)


def test_files_of_a_folder_come_sorted_and_their_rows_are_counted(tmp_path):
    for name in ("b.parquet", "a.pq", "c.json"):
        write(tmp_path / name, {"image": [b"x"] * 3, "text": ["y"] * 3}, row_group_size=2)
    source = ParquetSource(tmp_path)
    assert source.total == 6
    assert [item.key for item in source.samples()] == [
        f"{name}:{row}" for name in ("a.pq", "b.parquet") for row in range(3)
    ]
    assert ParquetSource(tmp_path / "b*").total == 3


def test_images_that_are_not_in_the_table_are_rejected_with_what_to_do(tmp_path):
    images = pa.array([{"bytes": None, "path": "/data/cat.jpg"}, None, {"bytes": None, "path": None}])
    items = read(write(tmp_path / "a.parquet", {"image": images, "text": ["x"] * 3}))
    images = pa.array([None], pa.binary())
    items += read(write(tmp_path / "b.parquet", {"image": images, "text": ["x"]}))
    assert [(item.key, item.reason) for item in items] == [
        (key, Reason.MISSING_FILE) for key in ("a.parquet:0", "a.parquet:1", "a.parquet:2", "b.parquet:0")
    ]
    assert "/data/cat.jpg" in items[0].detail
    assert "embed" in items[0].detail


def test_a_caption_that_is_not_utf8_costs_its_row_alone(tmp_path):
    texts = pa.array([b"fine", b"caf\xe9", b"fine too"])
    for column in (texts, texts.cast(pa.string(), safe=False)):
        items = read(write(tmp_path / "a.parquet", {"image": [b"x"] * 3, "text": column}))
        assert [item.captions[0] for item in (items[0], items[2])] == ["fine", "fine too"]
        assert items[1].reason is Reason.CAPTION_NOT_UTF8 or items[1].captions == ["caf\udce9"]


def test_nan_among_numbers_is_no_caption(tmp_path):
    pd.DataFrame({"image": [b"x", b"y"], "text": [1.5, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    assert [sample.captions for sample in samples(tmp_path)] == [["1.5"], []]


def test_a_damaged_file_is_one_reject_and_the_others_are_read(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.parquet", {"image": [b"x"], "text": ["y"]})
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    items = read(tmp_path)
    assert [item.key for item in items] == ["a.parquet:0", "b.parquet", "c.parquet:0"]
    assert items[1].reason is Reason.UNREADABLE
    assert str(tmp_path) not in items[1].detail
    assert ParquetSource(tmp_path).total == 3


def test_a_damaged_row_group_costs_no_other(tmp_path):
    random = np.random.default_rng(0)
    table = {"image": [random.bytes(500) for _ in range(30)], "text": [f"text {row}" for row in range(30)]}
    path = write(tmp_path / "a.parquet", table, row_group_size=10, compression="NONE", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(table["image"][14])] ^= 255
    path.write_bytes(data)
    items = read(path)
    rejected = [item for item in items if item.reason]
    kept = [item.key for item in items if not item.reason]
    assert kept == [f"a.parquet:{row}" for row in (*range(10), *range(20, 30))]
    assert [item.key for item in rejected] == ["a.parquet:10"]
    assert "rows 10 to 19" in rejected[0].detail


def test_flipped_bytes_never_crash_the_reader(tmp_path):
    table = {"image": [bytes([row]) * 50 for row in range(20)], "text": [f"text {row}" for row in range(20)]}
    data = write(tmp_path / "a.parquet", table, row_group_size=5).read_bytes()
    random = np.random.default_rng(2)
    for _ in range(100):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        (tmp_path / "a.parquet").write_bytes(damaged.tobytes())
        try:
            items = read(tmp_path / "a.parquet")
        except IngestError as error:
            assert "columns" in str(error)
        else:
            assert all(item.data is not None or item.detail for item in items)


def test_memory_is_flat_in_the_number_of_rows_of_a_row_group(tmp_path):
    def peak(rows: int) -> int:
        random = np.random.default_rng(3)
        table = {"image": [random.bytes(4000) for _ in range(rows)], "text": ["x"] * rows}
        path = write(tmp_path / "a.parquet", table, row_group_size=rows)
        del table
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in ParquetSource(path).samples())

    assert peak(16_384) < 1.2 * peak(2048)
