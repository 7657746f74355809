"""DVC's outs by their hash, compared with DVC itself: an upgrade of DVC that changes either side fails here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latentloom.dvc_outs import Place, bring, locate, locked_outs, out_hash
from latentloom.errors import UserError


def dvc(*arguments: str) -> None:
    """A command of DVC, without the second that its program takes to start."""
    from dvc.cli import main

    assert main(list(arguments)) == 0


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project of DVC with a folder as its remote, and a folder and a file, `folder` and `file`, added to it."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    dvc("init", "-q", "--no-scm")
    (tmp_path / "remote").mkdir()
    dvc("remote", "add", "-q", "-d", "local", str(tmp_path / "remote"))
    for name in ("a/x", "a-b", "ä", "deep/er/y"):
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (root / "file").write_text("a file")
    dvc("add", "-q", "folder", "file")
    return root


def added(name: str) -> str:
    (out,) = yaml.safe_load(Path(f"{name}.dvc").read_text())["outs"]
    return out["md5"]


def test_a_file_and_a_folder_have_the_hash_that_dvc_gives_them(project):
    assert (out_hash(project / "folder"), out_hash(project / "file")) == (added("folder"), added("file"))


def test_an_out_is_here_then_in_the_remote_then_lost_as_a_whole(project):
    outs = [added("folder"), added("file")]
    assert {place for place, _ in locate(project, outs).values()} == {Place.HERE}
    dvc("push", "-q")
    one = out_hash(project / "folder/a/x")
    (project / ".dvc/cache/files/md5" / one[:2] / one[2:]).unlink()
    found = locate(project, outs)
    assert [found[own][0] for own in outs] == [Place.REMOTE, Place.HERE]
    (project.parent / "remote/files/md5" / one[:2] / one[2:]).unlink()
    assert locate(project, outs)[outs[0]][0] is Place.LOST


@pytest.mark.parametrize("url", ["../gone", "http://127.0.0.1:9/store"])
def test_what_a_remote_holds_that_is_away_is_not_known(project, url):
    out = added("folder")
    dvc("remote", "modify", "-q", "local", "url", url)
    shutil.rmtree(".dvc/cache")
    assert locate(project, [out])[out][0] is Place.UNKNOWN


def test_without_a_remote_or_dvc_nothing_is_raised(project, tmp_path):
    out = added("folder")
    dvc("remote", "remove", "-q", "local")
    shutil.rmtree(".dvc/cache")
    assert locate(project, [out])[out][0] is Place.LOST
    assert locate(tmp_path, [out])[out][0] is Place.UNKNOWN


@pytest.mark.slow
def test_an_out_is_brought_back_by_its_hash_alone_from_the_cache_or_the_remote(project):
    folder, file = added("folder"), added("file")
    dvc("push", "-q")
    for name in ("folder", "file", ".dvc/cache"):
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()
    bring(project, {folder: project / "again/folder", file: project / "again/file"})
    assert (out_hash(project / "again/folder"), out_hash(project / "again/file")) == (folder, file)
    assert not list(project.glob("dvc-pull-*"))
    (project / "again/folder/more").touch()
    with pytest.raises(UserError, match=r"DVC does not have 0{32}\.dir: "):
        bring(project, {"0" * 32 + ".dir": project / "never", folder: project / "again/folder"})
    assert not (project / "never").exists()
    assert (project / "again/folder/more").exists()
    command = [sys.executable, "-m", "latentloom.dvc_outs", f"{folder}=again/folder", f"{file}=file"]
    subprocess.run(command, check=True)
    assert (out_hash(project / "again/folder"), out_hash(project / "file")) == (folder, file)  # over what is there


def test_a_lock_names_its_outs_and_no_lock_names_none():
    lock = {"stages": {"ingest": {"outs": [{"path": "data/images", "md5": "a.dir"}, {"path": "x"}]}, "none": {}}}
    assert locked_outs(yaml.safe_dump(lock)) == {"data/images": "a.dir"}
    assert locked_outs(None) == {}
