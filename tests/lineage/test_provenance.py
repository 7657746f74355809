"""What a training came from is written down as it was, and read back the same."""

import getpass
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from projects import ROOT

from latentloom.dvc_outs import out_hash
from latentloom.files import sha256_file, write_json
from latentloom.lineage.git import Git
from latentloom.lineage.provenance import Provenance, code_diff, collect, read_run_record, save_run_record
from latentloom.params import load_params

PARAMS = load_params(ROOT / "params.yaml")


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
    found = collect(repository, PARAMS, "c" * 64)
    assert (found.commit, found.branch, found.dirty) == (git("rev-parse", "HEAD"), "main", False)
    assert found.code_hash == "c" * 64
    lock = {"stages": {"i": {"outs": [{"path": "data/images", "md5": "a.dir"}, {"path": "models/unet", "md5": "b"}]}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock))
    found = collect(repository, PARAMS, "c" * 64)
    assert (found.dirty, found.outs) == (False, {"data/images": "a.dir"})  # not the model of the training before
    Path("src/a.py").write_text("a = 2\n")
    assert collect(repository, PARAMS, "c" * 64).dirty


def test_outside_git_and_dvc_nothing_is_known_and_nothing_is_raised(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("uid 12345")))
    found = collect(tmp_path, PARAMS, "c" * 64)
    assert (found.commit, found.dirty, found.branch, found.user, found.failed_checks) == (None,) * 5
    assert (found.outs, found.inputs, found.sources, code_diff(tmp_path)) == ({}, {}, [], "")


def test_the_diff_applied_to_the_commit_gives_the_code_back_byte_for_byte(repository, tmp_path_factory):
    Path("src/a.py").write_bytes(b"a = 2\r\n\xff\n")
    Path("src/new.py").write_bytes(b"")
    Path("src/binary").write_bytes(bytes(range(256)))
    diff = code_diff(repository)
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
    write_json("reports/validation.json", {"checks": {"good": {"success": True}, "bad": {"success": False}}})
    found = collect(repository, PARAMS, "c" * 64)
    assert found.inputs["latents"] == sha256_file("data/latents/index.parquet")
    assert (found.experiment, found.failed_checks, found.ingested) == ("gentle", ["bad"], {"kept": 2})
    assert found.sources == [{"source": "folder", "path": "x", "files": 3}]


def test_the_record_of_a_model_is_read_back_by_its_hash(repository):
    Path("models/unet").mkdir(parents=True)
    Path("models/unet/config.json").write_text("{}")
    started = collect(repository, PARAMS, "c" * 64)
    finished = started.with_model(model_sha256="m" * 64, mlflow_run_id="r", run_key="k")
    assert finished.outs["models/unet"] == out_hash(Path("models/unet"))
    save_run_record(repository, finished)
    assert read_run_record(repository, "m" * 64) == finished
    assert read_run_record(repository, "n" * 64) is None
    later = json.loads(json.dumps(finished.to_dict())) | {"a later key": 1}
    assert Provenance.from_dict(later) == finished


def test_commits_of_the_same_code_are_known_and_what_git_does_not_have_is_none(repository):
    earlier = git("rev-parse", "HEAD")
    Path("dvc.lock").write_text("md5: abc\n")
    git("commit", "-q", "-a", "-m", "Results")
    results, found = git("rev-parse", "HEAD"), Git(repository)
    assert found.same_code(earlier, results)
    Path("src/a.py").write_text("a = 3\n")
    git("commit", "-q", "-a", "-m", "Later")
    assert not found.same_code(earlier, "HEAD")
    assert (found.branches(results), found.read(results, "dvc.lock")) == (["main"], b"md5: abc\n")
    assert (found.has(results), found.has("0" * 40)) == (True, False)
    shutil.rmtree(".git")
    assert found.commit() is None
