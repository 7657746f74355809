"""A reader never meets half a file."""

import errno
import subprocess
import sys

import pytest

from latentloom.files import atomic_path, read_json, write_json


def test_the_old_file_stays_when_writing_fails(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_numbers_that_json_does_not_know_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_json_is_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist: run `dvc repro`"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"half\.json is not valid JSON .*delete it and run `dvc repro`"):
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


def test_the_room_needed_is_never_told_as_none(tmp_path):
    with pytest.raises(OSError, match=r"it needs 0\.1 MiB"), atomic_path(tmp_path / "a.txt", room=100):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_that_room_would_not_cure_does_not_ask_for_room(tmp_path):
    with pytest.raises(OSError, match="could not write") as caught, atomic_path(tmp_path / "a.txt"):
        pass  # nothing is written, so there is nothing to rename
    assert "Make room" not in str(caught.value)
