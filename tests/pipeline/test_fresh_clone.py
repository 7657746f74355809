"""A fresh clone, run by real new interpreters as a user's are, ends with the bytes that were committed."""

from pathlib import Path

import pytest
from projects import STAGES, Project, stages_run

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def committed(finished, tmp_path_factory) -> Project:
    """A finished project whose results are committed; the server of stages ran its stages."""
    project = finished.copied(tmp_path_factory.mktemp("committed") / "project")
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "Results")
    assert changes(project) == []
    return project


@pytest.fixture(scope="module")
def clone(committed, tmp_path_factory) -> tuple[Project, list[str]]:
    """A clone in which `dvc repro` ran from nothing, in a locale of ASCII alone, then the evaluation by
    force; and the stages that ran at first."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    committed.run("git", "clone", "-q", str(committed.folder), str(folder))
    project = Project(folder, cold=True)
    ran = stages_run(project.run("env", "LC_ALL=C", "PYTHONUTF8=0", "dvc", "repro").stdout)
    project.run("env", "PYTHONPATH=src", "python", "pipelines/evaluate.py")
    return project, ran


def changes(project: Project) -> list[str]:
    """What git sees as changed or new."""
    return project.run("git", "status", "--porcelain").stdout.splitlines()


def bytes_of(project: Project, *folders: str) -> dict[str, bytes]:
    paths = [path for folder in folders for path in sorted((project.folder / folder).rglob("*")) if path.is_file()]
    return {path.relative_to(project.folder).as_posix(): path.read_bytes() for path in paths}


def test_the_whole_pipeline_runs_in_a_clone_and_changes_nothing_that_git_tracks(clone):
    project, ran = clone
    assert ran == [
        stage for stage in STAGES if stage != "evaluate"
    ]  # whose results are in git, and its inputs the same
    assert changes(project) == []


def test_data_model_and_samples_are_those_of_the_first_machine_to_the_byte(clone, committed):
    ours, theirs = (bytes_of(project, "data", "models", "reports") for project in (clone[0], committed))
    assert ours.keys() == theirs.keys()
    assert [path for path in ours if ours[path] != theirs[path]] == []


def test_no_file_that_git_tracks_names_a_run_or_the_machine(committed):
    for path in committed.run("git", "ls-files", "reports", "dvc.lock").stdout.split():
        content = (committed.folder / path).read_bytes()
        assert str(Path.home()).encode() not in content, path
        assert b"run_id" not in content, path
        assert str(committed.folder).encode() not in content, path
