"""An ingestion as a whole: what is kept, counted and split, and what a crash leaves behind."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentloom.errors import UserError
from latentloom.ingestion import ingest as stage
from latentloom.ingestion.pngs import encode
from latentloom.ingestion.shards import read_manifest, read_metadata
from latentloom.ingestion.sources import IngestError
from latentloom.ingestion.splits import split_of


def test_what_is_found_is_kept_or_rejected(corpus):
    for number in range(6):
        corpus.add(f"{number}.png", f"picture {number}\nagain {number}")
    corpus.add("bare.png")
    corpus.add("empty.png", "nothing", b"")
    report = corpus.ingest()
    assert (report.found, report.kept, report.rejected) == (8, 6, 2)
    assert report.reasons == {"empty_file": 1, "no_caption": 1}
    assert report.captions == 12
    assert report.train + report.validation == 6
    assert "2 rejected (1 empty_file, 1 no_caption)" in str(report)
    assert set(report.to_dict()) == {
        "found",
        "kept",
        "rejected",
        "reasons",
        "train",
        "validation",
        "captions",
        "joined",
        "sources",
        "near_duplicates",
        "moved_to_train",
        "profiles_converted",
        "profiles_ignored",
    }


def test_an_empty_validation_split_is_said_plainly(corpus):
    corpus.add("a.png", "a picture")
    corpus.add("b.png", "another picture")
    notice = "no held-out image: training can neither validate nor keep the best"
    assert notice in str(corpus.ingest(val_fraction=0.0))
    held_out = corpus.ingest(val_fraction=0.999)
    assert held_out.validation == 2
    assert notice not in str(held_out)


def test_the_table_of_rejects_has_the_same_columns_when_it_is_empty(corpus):
    corpus.add("a.png", "a picture")
    corpus.ingest()
    empty = pd.read_parquet(corpus.rejects)
    corpus.add("b.png")
    corpus.ingest()
    filled = pd.read_parquet(corpus.rejects)
    assert list(empty) == list(filled) == ["source", "key", "reason", "detail", "preview"]
    assert (len(empty), len(filled)) == (0, 1)
    assert pd.read_parquet(corpus.rejects)["reason"].tolist() == ["no_caption"]


def test_ids_depend_on_pixels_alone(corpus, new_corpus, picture):
    corpus.add("a.png", "a caption", picture(1))
    other = new_corpus("other")
    other.add("deep/renamed.tiff", "another caption", picture(1))
    corpus.ingest()
    other.ingest()
    assert list(corpus.ids().values()) == list(other.ids().values())


def test_another_size_and_back_never_serves_pictures_of_the_other(corpus, contents, picture):
    corpus.add("a.png", "a", picture(1, 100, 100))
    corpus.add("b.png", "b", picture(2, 100, 100))
    corpus.ingest(image_size=64)
    first, ids = contents(corpus.images), corpus.ids()
    corpus.ingest(image_size=96)
    assert {pixels.shape for pixels in corpus.pixels().values()} == {(96, 96, 3)}
    assert not set(corpus.ids().values()) & set(ids.values())  # by which latents are known
    corpus.ingest(image_size=64)
    assert contents(corpus.images) == first


def test_new_data_never_moves_old_data_between_the_splits(corpus):
    for number in range(0, 40, 2):
        corpus.add(f"{number:02}.png", "a picture")
    corpus.ingest(val_fraction=0.3)
    before = read_metadata(corpus.images).set_index("id")["split"]
    for number in range(1, 40, 2):
        corpus.add(f"{number:02}.png", "a picture")
    corpus.ingest(val_fraction=0.3)
    after = read_metadata(corpus.images).set_index("id")["split"]
    assert len(after) == 40
    assert set(before) == {"train", "validation"}
    assert after[before.index].equals(before)


def test_a_larger_validation_share_keeps_the_smaller_one():
    ids = [f"{number * 2**60 + 12345:016x}" + "0" * 48 for number in range(16)]
    smaller = {own_id for own_id in ids if split_of(own_id, 0.25) == "validation"}
    larger = {own_id for own_id in ids if split_of(own_id, 0.5) == "validation"}
    assert (len(smaller), len(larger)) == (4, 8)
    assert smaller < larger
    assert not any(split_of(own_id, 0.0) == "validation" for own_id in ids)


def test_of_equal_pictures_the_first_is_kept_with_its_own_captions(corpus, picture):
    corpus.add("b.bmp", "second", picture(1))
    corpus.add("a.png", "first", picture(1))
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["first"]}
    assert corpus.details() == {"b.bmp": "the same picture as a.png"}


def test_a_copy_without_a_caption_does_not_take_the_place_of_the_captioned(corpus, picture):
    corpus.add("a.png", None, picture(1))
    corpus.add("b.png", "captioned", picture(1))
    corpus.ingest()
    assert corpus.captions() == {"b.png": ["captioned"]}
    assert corpus.reasons() == {"a.png": "no_caption"}


def coco(rows, picture, path: Path, name="coco.parquet") -> dict:
    """Params of a table that has each picture as often as it has captions."""
    files = {}
    for own in {own for own, _ in rows}:
        buffer = io.BytesIO()
        Image.fromarray(picture(own)).save(buffer, "PNG")
        files[own] = buffer.getvalue()
    table = pa.table({"image": [files[own] for own, _ in rows], "caption": [caption for _, caption in rows]})
    pq.write_table(table, path / name)
    return {"source": "parquet", "path": str(path / name)}


def test_rows_of_byte_equal_pictures_of_a_table_are_one_image_with_all_captions(corpus, picture, tmp_path, shards_of):
    shards_of(2)
    rows = [(own, f"picture {own}, caption {caption}") for caption in range(5) for own in range(4)]
    report = corpus.ingest(**coco([*rows, (0, rows[0][1])], picture, tmp_path))
    assert (report.found, report.kept, report.rejected, report.joined, report.captions) == (4, 4, 0, 17, 20)
    assert "captions of 17 equal pictures joined" in str(report)
    assert corpus.captions() == {
        f"coco.parquet:{own}": [f"picture {own}, caption {caption}" for caption in range(5)] for own in range(4)
    }


def test_captions_that_count_more_often_do_so_beside_those_of_equal_pictures(corpus, picture, tmp_path):
    png = encode(picture(1))
    table = pa.table({"image": [png] * 3, "long": ["a", "b", "a"], "short": ["c", "d", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    entry = {"source": "parquet", "path": str(tmp_path / "a.parquet"), "caption_column": {"long": 2, "short": 1}}
    report = corpus.ingest(source=[entry], path=None)
    assert corpus.captions() == {"a.parquet:0": ["a", "a", "c", "b", "b", "d"]}
    assert report.captions == 4


def test_samples_of_byte_equal_pictures_of_a_tar_are_one_image_and_of_a_folder_duplicates(corpus, tmp_path):
    picture = corpus.add("a.png", "one").read_bytes()
    corpus.add("b.png", "two", picture)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            tar.add(corpus.path / name, name)
    corpus.ingest(source="webdataset", path=str(tmp_path / "a.tar"))
    assert corpus.captions() == {"a.tar/a": ["one", "two"]}
    corpus.ingest()
    assert corpus.captions() == {"a.png": ["one"]}
    assert corpus.reasons() == {"b.png": "duplicate"}


def test_what_a_table_gives_does_not_depend_on_whether_rows_or_lists_hold_the_captions(
    corpus, new_corpus, picture, tmp_path, contents
):
    rows = [(own, f"{own} {caption}") for own in range(5) for caption in range(3)]
    corpus.ingest(**coco(rows, picture, tmp_path, "a.parquet"), near_duplicate_distance=20)
    whole = [(own, [f"{own} {caption}" for caption in range(3)]) for own in range(5)]
    other = new_corpus("other")
    other.ingest(**coco(whole, picture, tmp_path, "a.parquet"), near_duplicate_distance=20)
    assert read_metadata(corpus.images).drop(columns="key").equals(read_metadata(other.images).drop(columns="key"))


def test_the_last_image_below_the_limit_has_the_captions_of_the_rows_behind_it(corpus, picture, tmp_path):
    rows = [(own, f"{own} {caption}") for own in range(4) for caption in range(3)]
    report = corpus.ingest(**coco(rows, picture, tmp_path), limit=2)
    assert list(corpus.captions().values()) == [["0 0", "0 1", "0 2"], ["1 0", "1 1", "1 2"]]
    assert (report.found, report.kept, report.joined) == (2, 2, 4)


def test_equal_pictures_of_two_tables_are_duplicates(corpus, picture, tmp_path):
    sources = [coco([(0, "one")], picture, tmp_path, "a.parquet"), coco([(0, "two")], picture, tmp_path, "b.parquet")]
    corpus.ingest(source=[own | {"name": name} for own, name in zip(sources, "ab", strict=True)], path=None)
    assert corpus.captions() == {"a.parquet:0": ["one"]}
    assert corpus.details() == {"b.parquet:0": "the same picture as a.parquet:0 of a"}


def test_limit_keeps_the_first_usable_images_in_sorted_order(corpus):
    corpus.add("0.png", "broken", b"")
    for name in ("c.png", "b.png", "a.png", "d.png"):
        corpus.add(name, "a picture")
    report = corpus.ingest(limit=2)
    assert list(corpus.captions()) == ["a.png", "b.png"]
    assert (report.found, report.kept, report.rejected) == (3, 2, 1)


def test_the_source_is_never_written_to(corpus, contents):
    corpus.add("a.png", "a picture")
    corpus.add("bad.png", "broken", b"junk")
    corpus.write("sub/metadata.csv", "file_name,text\ngone.png,x\n")
    before = contents(corpus.path)
    corpus.ingest()
    assert contents(corpus.path) == before
    with pytest.raises(IngestError, match="never written to"):
        corpus.ingest(path=str(corpus.out))
    with pytest.raises(IngestError, match="never written to"):
        corpus.ingest(path=str(corpus.images))


def test_when_nothing_is_left_the_reasons_are_listed_and_the_images_are_not_taken_for_finished(corpus):
    good = corpus.add("a.png", "a picture")
    corpus.ingest()
    good.write_bytes(b"")
    corpus.add("bare.png")
    with pytest.raises(IngestError, match=r"2 of 2 samples \(100\.0%\) were rejected, and no image is left") as caught:
        corpus.ingest()
    assert "1 empty_file, such as folder: a.png" in str(caught.value)
    assert corpus.reasons() == {"a.png": "empty_file", "bare.png": "no_caption"}
    with pytest.raises(UserError, match="dvc repro"):
        read_manifest(corpus.images)


def test_too_many_rejects_stop_the_stage_with_the_reasons_counted_most_frequent_first(corpus):
    for number in range(4):
        corpus.add(f"{number}.png", "a picture")
    for number in range(3):
        corpus.add(f"bare{number}.png")
    corpus.add("empty.png", "nothing", b"")
    assert corpus.ingest(max_reject_fraction=0.5).rejected == 4
    corpus.add("zero.png", "nothing", b"")
    with pytest.raises(IngestError) as caught:
        corpus.ingest(max_reject_fraction=0.5)
    first, most, second, last = str(caught.value).splitlines()
    assert first == "5 of 9 samples (55.6%) were rejected, and ingest.max_reject_fraction allows 50.0%:"
    assert most == "  3 no_caption, such as folder: bare0.png"
    assert second == "  2 empty_file, such as folder: empty.png"
    assert str(corpus.rejects) in last
    assert "raise ingest.max_reject_fraction" in last
    assert len(pd.read_parquet(corpus.rejects)) == 5
    assert not (corpus.images / "manifest.json").exists()


def test_where_the_limit_ends_the_run_only_what_was_looked_at_counts_as_rejected(corpus):
    corpus.add("a.png", "a picture")
    for number in range(9):
        corpus.add(f"bare{number}.png")
    assert corpus.ingest(limit=1, max_reject_fraction=0.1).rejected == 0


def test_shards_and_temporary_files_of_earlier_runs_go_once_the_new_ones_are_whole(corpus, shards_of):
    shards_of(2)
    for number in range(5):
        corpus.add(f"{number}.png", "a picture")
    corpus.ingest()
    (corpus.images / ".00001.parquet.999.tmp").write_bytes(b"of a killed run")
    corpus.ingest(limit=2)
    assert sorted(path.name for path in corpus.images.iterdir()) == ["00000.parquet", "manifest.json"]


@pytest.mark.fault
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    "error", [RuntimeError("a fault"), KeyboardInterrupt(), MemoryError(), OSError(28, "No space left on device")]
)
def test_a_failure_in_the_middle_leaves_no_partial_file_and_no_manifest(corpus, shards_of, monkeypatch, error, workers):
    shards_of(2)
    monkeypatch.setenv("LATENTLOOM_WORKERS", workers)
    for number in range(5):
        corpus.add(f"{number}.png", "a picture")
    corpus.ingest(limit=1)
    prepare = stage.preprocess_sample

    def fail(source, sample, *rest):  # whichever worker comes first, the three before are good
        if sample.key == "3.png":
            raise error
        return prepare(source, sample, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "preprocess_sample", fail)
        with pytest.raises(type(error)):
            corpus.ingest()
    assert "00000.parquet" in {path.name for path in corpus.images.iterdir()}
    assert not [path.name for path in corpus.out.rglob(".*")]
    assert pd.read_parquet(corpus.rejects).empty
    with pytest.raises(UserError, match="dvc repro"):
        read_manifest(corpus.images)
    corpus.ingest()
    assert len(read_metadata(corpus.images)) == 5


def test_a_file_that_the_disk_cannot_read_is_rejected_and_the_rest_continues(corpus, monkeypatch):
    corpus.add("a.png", "a picture")
    corpus.add("b.png", "a picture")
    corpus.add("c.png", "a picture")
    path_type = type(corpus.path)
    read_bytes = path_type.read_bytes

    def read(path: Path) -> bytes:
        if path.name in ("b.png", "c.txt"):
            raise OSError(5, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(path_type, "read_bytes", read)
    corpus.ingest()
    assert corpus.reasons() == dict.fromkeys(("b.png", "c.png"), "unreadable")
    assert corpus.details() == {"b.png": "b.png: Input/output error", "c.png": "c.txt: Input/output error"}


def test_a_lost_sample_is_noticed(corpus, monkeypatch):
    corpus.add("a.png", "a picture")
    corpus.add("b.png", "a picture")
    write = stage.write_shards
    monkeypatch.setattr(
        stage, "write_shards", lambda rows, folder: write((row for row in rows if row.key != "a.png"), folder)
    )
    with pytest.raises(RuntimeError, match="one was lost"):
        corpus.ingest()


def test_progress_goes_to_standard_error_with_rate(corpus, capsys):
    corpus.add("a.png", "a picture")
    stage.ingest(
        corpus.params(),
        corpus.images,
        corpus.rejects,
        corpus.near_duplicates,
    )
    captured = capsys.readouterr()
    assert "ingest: 100%" in captured.err
    assert "image/s" in captured.err
    assert captured.out == ""


@pytest.fixture
def two_sources(corpus, new_corpus):
    """Params of two folders, ``drawings`` and ``photos``, with three and two images and one reject each."""
    drawings, photos = new_corpus("first"), new_corpus("second")
    for number in range(3):
        drawings.add(f"{number}.png", "a drawing", np.full((40, 40, 3), 40 * number, np.uint8))
    for number in range(2):
        photos.add(f"{number}.png", "a photo", np.full((40, 40, 3), 40 * number + 7, np.uint8))
    drawings.add("bare.png")
    photos.add("copy.png", "another caption", np.full((40, 40, 3), 40, np.uint8))
    entries = [
        {"source": "folder", "path": str(drawings.path), "name": "drawings"},
        {"source": "folder", "path": str(photos.path), "name": "photos", "weight": 2.5},
    ]
    return {"source": entries, "path": None}


def test_several_sources_come_one_after_another_under_their_names(corpus, two_sources):
    report = corpus.ingest(**two_sources)
    frame, rejects = read_metadata(corpus.images), pd.read_parquet(corpus.rejects)
    assert list(zip(frame["source"], frame["key"], strict=True)) == [
        ("drawings", "0.png"),
        ("drawings", "1.png"),
        ("drawings", "2.png"),
        ("photos", "0.png"),
        ("photos", "1.png"),
    ]
    assert rejects[["source", "key", "reason"]].to_numpy().tolist() == [
        ["drawings", "bare.png", "no_caption"],
        ["photos", "copy.png", "duplicate"],
    ]
    assert rejects["detail"][1] == "the same picture as 1.png of drawings"
    counts = [
        {"name": "drawings", "source": "folder", "weight": 1.0, "found": 4, "kept": 3, "rejected": 1},
        {"name": "photos", "source": "folder", "weight": 2.5, "found": 3, "kept": 2, "rejected": 1},
    ]
    assert report.sources == counts
    credits = {"attribution": None, "licence": None}
    assert read_manifest(corpus.images)["sources"] == [count | credits for count in counts]
    assert (report.found, report.kept, report.rejected) == (7, 5, 2)


def test_the_limit_counts_the_kept_images_of_all_sources(corpus, two_sources):
    report = corpus.ingest(**two_sources, limit=4)
    assert read_metadata(corpus.images)["source"].tolist() == ["drawings"] * 3 + ["photos"]
    assert [source["found"] for source in report.sources] == [4, 1]


def test_thanks_go_to_the_sources_that_gave_images(corpus, two_sources):
    entries = [*two_sources["source"], {"source": "openmoji"}]
    corpus.ingest(source=entries, path=None, limit=5)
    assert read_manifest(corpus.images)["licence"] is None
    corpus.ingest(source=entries, path=None, limit=7)
    manifest = read_manifest(corpus.images)
    assert manifest["licence"] == "CC BY-SA 4.0"
    assert manifest["attribution"].startswith("All emojis designed by OpenMoji")


@pytest.mark.parametrize("path", ["", "/*.parquet", "/images/00000.parquet", "/images", "/images/*"])
def test_no_source_may_hold_what_the_stage_writes(corpus, path):
    entry = {"source": "parquet", "path": f"{corpus.out}{path}"}
    with pytest.raises(IngestError, match="never written to"):
        corpus.ingest(source=[entry], path=None)


def opened(preview: bytes) -> Image.Image:
    return Image.open(io.BytesIO(preview))


def test_rejected_pictures_are_previewed_where_they_can_be_decoded(corpus, picture):
    white = np.full((300, 200, 3), 255, np.uint8)
    corpus.add("kept.png", "a picture", picture(1))
    corpus.add("copy.png", "a copy", picture(1))
    corpus.add("bare.png", None, white)
    corpus.add("blank.png", "  ", white)
    corpus.add("wide.png", "a line", picture(2, 2, 900))
    corpus.add("tiny.png", "a speck", picture(3, 4, 4))
    corpus.add("cut.png", "half", corpus.add("whole.png", "whole", picture(4)).read_bytes()[:2000])
    corpus.add("empty.png", "nothing", b"")
    corpus.ingest(max_aspect_ratio=3.0)
    previews, reasons = corpus.previews(), corpus.reasons()
    assert {key for key, preview in previews.items() if preview is None} == {"cut.png", "empty.png"}
    assert {key: opened(preview).size for key, preview in previews.items() if preview} == {
        "kept.png": (32, 32),
        "bare.png": (43, 64),
        "blank.png": (43, 64),
        "wide.png": (64, 1),
        "tiny.png": (4, 4),
    }
    assert reasons["kept.png"] == "duplicate"  # of copy.png, which comes first
    assert np.array_equal(np.asarray(opened(previews["kept.png"])), picture(1))


@pytest.mark.parametrize("workers", ["1", "3"])
def test_only_the_first_of_each_reason_have_a_preview(corpus, monkeypatch, workers):
    monkeypatch.setenv("LATENTLOOM_WORKERS", workers)
    monkeypatch.setattr("latentloom.ingestion.rejects.PREVIEWS", 3)
    corpus.add("a.png", "a picture")
    for number in range(60):
        corpus.add(f"x{number:02}.png", None if number % 2 else "tiny", np.zeros((4, 4, 3), np.uint8))
        corpus.write(f"w{number:02}.png", b"no picture")
    corpus.ingest()
    with_one = [key for key, preview in corpus.previews().items() if preview]
    assert with_one == [f"x{number:02}.png" for number in range(6)]
