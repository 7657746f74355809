"""DVC runs a stage's command by the user's own shell: each command means the same under all of them."""

import shutil
import subprocess

import pytest
import yaml
from projects import ROOT, STAGES

COMMANDS = {
    name: stage["cmd"]
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items()
}
SHELLS = ("bash", "dash", "zsh", "fish")


@pytest.fixture(params=SHELLS)
def shell(request) -> str:
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"there is no {request.param} on this machine")
    return found


@pytest.mark.parametrize("stage", ["find_sources", *STAGES])
def test_a_stages_command_starts_python_with_the_same_words(shell, stage, tmp_path):
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$#" "$@"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    printed = subprocess.run(
        [shell, "-c", COMMANDS[stage]], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert printed.stdout.splitlines() == ["src", "1", f"pipelines/{stage}.py"]
    assert printed.stderr == ""


@pytest.mark.pipeline
def test_dvc_runs_a_stage_by_it(shell, finished, tmp_path):
    project = finished.copied(tmp_path / "project")
    printed = project.run("env", f"SHELL={shell}", "dvc", "repro", "find_sources").stdout
    assert "find_sources: openmoji" in printed
