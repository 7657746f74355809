"""What a training came from is written down as it was, and read back the same."""

import getpass
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from latentloom.dvc_outs import out_hash
from latentloom.files import sha256_file, write_json
from latentloom.tracking.git import Git
from latentloom.tracking.provenance import Provenance, collect, read_run_record, save_run_record


def git(*arguments: str) -> str:
    identity = ("-c", "user.email=test@example.org", "-c", "user.name=Test")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    git("init", "-q", "-b", "main")
    Path("src").mkdir()
    Path("src/a.py").write_text("a = 1\r\n", newline="")
    Path("dvc.lock").write_text("{}\n")
    git("add", "-A")
    git("commit", "-q", "-m", "Some code")
    return tmp_path


def test_the_commit_the_branch_and_local_changes_are_recorded_and_the_pipelines_results_are_none(repository):
    found = collect(repository)
    assert (found.commit, found.branch, found.dirty) == (git("rev-parse", "HEAD"), "main", False)
    lock = {"stages": {"i": {"outs": [{"path": "data/images", "md5": "a.dir"}, {"path": "models/unet", "md5": "b"}]}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    found = collect(repository)
    assert (found.dirty, found.outs) == (False, {"data/images": "a.dir"})  # not the model of the training before
    Path("src/a.py").write_text("a = 2\n")
    assert collect(repository).dirty


def test_outside_git_and_dvc_nothing_is_known_and_nothing_is_raised(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("uid 12345")))
    found = collect(tmp_path)
    assert (found.commit, found.dirty, found.branch, found.user, found.failed_checks) == (None,) * 5
    assert (found.outs, found.inputs, found.sources, Git(tmp_path).code_diff()) == ({}, {}, [], "")


def test_the_diff_applied_to_the_commit_gives_the_code_back_byte_for_byte(repository, tmp_path_factory):
    Path("src/a.py").write_bytes(b"a = 2\r\n\xff\n")
    Path("src/new.py").write_bytes(b"")
    Path("src/binary").write_bytes(bytes(range(256)))
    diff = Git(repository).code_diff()
    assert git("status", "--porcelain", "src/new.py").startswith("??")  # the user's index is as it was
    clone = tmp_path_factory.mktemp("clone") / "clone"
    git("clone", "-q", str(repository), str(clone))
    (clone / "code.diff").write_bytes(diff.encode("utf-8", "surrogateescape"))
    git("-C", str(clone), "apply", "--whitespace=nowarn", "code.diff")
    for name in ("a.py", "new.py", "binary"):
        assert (clone / "src" / name).read_bytes() == Path("src", name).read_bytes()


def test_the_data_the_sources_the_validation_and_a_dvc_experiment_are_recorded(repository, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "gentle")
    Path("data/latents").mkdir(parents=True)
    Path("data/latents/index.parquet").write_text("rows")
    write_json("data/sources.json", [{"source": "folder", "path": "x", "files": 3}])
    write_json("reports/ingest.json", {"kept": 2})
    write_json("data/validated.json", {"failed": ["bad"]})
    found = collect(repository)
    assert found.inputs["latents"] == sha256_file("data/latents/index.parquet")
    assert (found.experiment, found.failed_checks, found.ingested) == ("gentle", ["bad"], {"kept": 2})
    assert found.sources == [{"source": "folder", "path": "x", "files": 3}]


def test_the_record_of_a_model_is_read_back_by_its_hash(repository):
    Path("models/unet").mkdir(parents=True)
    Path("models/unet/config.json").write_text("{}")
    started = collect(repository)
    finished = started.with_model(Path("models/unet"), "m" * 64, "k")
    assert finished.outs["models/unet"] == out_hash(Path("models/unet"))
    save_run_record(repository, finished)
    assert read_run_record(repository, "m" * 64) == finished
    assert read_run_record(repository, "n" * 64) is None
    later = json.loads(json.dumps(asdict(finished))) | {"a later key": 1}
    assert Provenance.from_dict(later) == finished


def test_what_git_does_not_have_is_none(repository):
    head, found = git("rev-parse", "HEAD"), Git(repository)
    assert (found.read(Path("dvc.lock")), found.read(Path("nothing"))) == (b"{}\n", None)
    assert (found.has(head), found.has("0" * 40)) == (True, False)
    shutil.rmtree(".git")
    assert found.commit() is None
