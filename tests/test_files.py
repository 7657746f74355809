"""A reader never meets half a file."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from latentloom.errors import UserError, WriteError
from latentloom.files import atomic_path, read_json, write_json, write_text


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_numbers_that_json_does_not_know_are_rejected_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_json_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"none\.json does not exist: run `dvc repro`"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"half\.json is not valid JSON .*delete it and run `dvc repro`"):
        read_json(tmp_path / "half.json")


def test_a_full_disk_names_the_file_and_the_room_and_leaves_nothing_behind(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from latentloom.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(sys.argv[1], 'x' * 3 * 2**20)\n"
    )
    path = tmp_path / "big.txt"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert result.returncode != 0
    assert f"could not write {path}" in result.stderr
    assert "it needs 3.0 MiB" in result.stderr
    assert "MiB are free there" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_room_needed_is_never_reported_as_none(tmp_path):
    with pytest.raises(WriteError, match=r"it needs 0\.1 MiB"), atomic_path(tmp_path / "a.txt", room=100):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_that_room_would_not_cure_does_not_ask_for_room(tmp_path):
    with pytest.raises(WriteError, match="could not write") as caught, atomic_path(tmp_path / "a.txt"):
        pass  # nothing is written, so there is nothing to rename
    assert "Make room" not in str(caught.value)


def test_a_file_that_cannot_be_written_is_an_error_that_the_user_can_fix_and_keeps_the_systems_number(tmp_path):
    with pytest.raises(UserError) as caught, atomic_path(tmp_path / "a.txt", room=10) as temporary:
        temporary.write_text("half of")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).startswith(f"could not write {tmp_path / 'a.txt'}: No space left on device; it needs")
    assert not list(tmp_path.iterdir())


def test_a_bug_in_the_block_that_writes_stays_the_bug_it_is(tmp_path):
    with pytest.raises(KeyError), atomic_path(tmp_path / "a.txt"):
        {}["missing"]


def test_the_file_reaches_the_disk_before_its_name_does_and_the_name_before_the_call_ends(tmp_path, monkeypatch):
    steps = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor):
        steps.append("flush folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "flush file")
        flush(descriptor)

    def replace(source, target):
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "a.txt", "text")
    assert steps == ["flush file", "rename", "flush folder"]


@pytest.mark.parametrize(("number", "writes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders_is_none_the_worse(tmp_path, monkeypatch, number, writes):
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if writes:
        write_text(tmp_path / "a.txt", "text")
        assert (tmp_path / "a.txt").read_text() == "text"
    else:
        with pytest.raises(WriteError, match="could not write"):
            write_text(tmp_path / "a.txt", "text")
