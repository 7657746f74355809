"""Where DVC keeps the files of an out: compared with DVC itself, so that another layout of a later DVC is noticed."""

from pathlib import Path

import pytest

from latentloom.encoding.pulled_shards import pulled_shards

OUT = Path("data/latents")


def dvc(*arguments: str) -> None:
    """A command of DVC, without the seconds that its program takes to start."""
    from dvc.cli import main

    assert main(list(arguments)) == 0


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A DVC project whose stage has made two shards, one of them in a folder, and a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    dvc("init", "--no-scm", "-q")
    command = (
        f"mkdir -p {OUT}/flipped && cd {OUT} && echo a > 0.safetensors && echo b > flipped/0.safetensors && echo c > i"
    )
    dvc("stage", "add", "-q", "-n", "encode", "-o", str(OUT), command)
    return tmp_path


def test_the_shards_in_dvcs_cache_are_found_wherever_the_cache_is(project, tmp_path_factory):
    dvc("repro", "-q")
    expected = [b"a\n", b"b\n"]
    assert [path.read_bytes() for path in pulled_shards(OUT)] == expected, "DVC's cache or dvc.lock has another layout"
    elsewhere = tmp_path_factory.mktemp("shared cache")
    dvc("config", "--local", "cache.dir", str(elsewhere))
    assert pulled_shards(OUT) == []
    dvc("commit", "-q", "--force")
    assert [path.read_bytes() for path in pulled_shards(OUT)] == expected
    assert all(path.is_relative_to(elsewhere) for path in pulled_shards(OUT))


@pytest.mark.parametrize("lock", [None, "", "stages: [", "schema: '2.0'\nstages:\n  encode:\n    cmd: x\n"])
def test_without_a_usable_lock_there_are_none(tmp_path, monkeypatch, lock):
    monkeypatch.chdir(tmp_path)
    if lock is not None:
        Path("dvc.lock").write_text(lock)
    assert pulled_shards(OUT) == []
