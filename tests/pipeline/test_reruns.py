"""A change reruns exactly the stages it must: for every key of params.yaml as dvc.yaml says, and once for real."""

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from projects import ROOT, STAGES, Project, stages_run
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.files import read_json

GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

AFTER = {  # a stage, and all that must follow when what it leaves is new
    "ingest": ["ingest", "encode_images", "encode_text", "validate", "train", "evaluate"],
    "encode_images": ["encode_images", "validate", "train", "evaluate"],
    "encode_text": ["encode_text", "validate", "train", "evaluate"],
    "validate": ["validate", "train", "evaluate"],
    "train": ["train", "evaluate"],
    "evaluate": ["evaluate"],
}
RERUNS = {  # section of params.yaml, or a key of it -> the stages that a change of any of its other keys reruns
    "model.text": AFTER["encode_text"],  # which stores what the network reads
    "seed": AFTER["train"],
    "ingest": AFTER["ingest"],
    "encode_images": AFTER["encode_images"],
    "encode_text": AFTER["encode_text"],
    "validate": AFTER["validate"],
    "model": AFTER["train"],
    "diffusion": AFTER["train"],
    "train": AFTER["train"],
    "monitor": [],  # decides no weight
    "previews": [],
    "machine": [],
    "evaluate": AFTER["evaluate"],
    "registry": [],  # what promotions ask for
}


def keys(params: dict[str, Any], above: str = "") -> Iterator[str]:
    """Every key, with those of the sections it lies in."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from keys(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def rerun_by(key: str) -> list[str]:
    """The stages that a change of a key reruns: those that read it, and those that read what these leave."""

    def reads(stage: str) -> bool:
        read = GRAPH[stage].get("params", [])
        return any(key == name or key.startswith(f"{name}.") for name in read)

    return with_those_after({stage for stage in STAGES if reads(stage)})


def with_those_after(changed: set[str]) -> list[str]:
    """Those stages, and all that read what these leave."""
    while True:
        left = {out for stage in changed for out in outs(stage)}
        more = {stage for stage in STAGES if left & set(GRAPH[stage]["deps"])} - changed
        if not more:
            return [stage for stage in STAGES if stage in changed]
        changed |= more


def outs(stage: str) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in GRAPH[stage].get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


@pytest.mark.parametrize("key", keys(PARAMS))
def test_a_change_of_a_param_reruns_the_stages_that_depend_on_it_and_no_others(key):
    assert rerun_by(key) == (RERUNS.get(key) or RERUNS[key.partition(".")[0]])


@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_to_a_stages_script_reruns_it_and_what_follows_so_that_the_evaluation_never_retrains(stage):
    reading = {name for name in STAGES if f"pipelines/{stage}.py" in GRAPH[name]["deps"]}
    assert with_those_after(reading) == AFTER[stage]


def test_every_stage_names_its_params_as_they_are_called():
    known = {*keys(PARAMS), *PARAMS}
    for stage, described in GRAPH.items():
        assert set(described.get("params", [])) <= known, stage


def test_git_ignores_what_dvc_keeps_and_nothing_else_whatever_a_failed_repro_did(tmp_path):
    """A stage that fails makes DVC take back what earlier stages wrote into a .gitignore: here they write nothing."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy2(ROOT / ".gitignore", tmp_path)
    entries = [
        entry for stage in GRAPH.values() for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])
    ]
    kept = {entry for entry in entries if isinstance(entry, str)}
    committed = {name for entry in entries if isinstance(entry, dict) for name in entry}
    paths = "\n".join([*kept, *committed])
    ignored = subprocess.run(
        ["git", "check-ignore", "--stdin"], cwd=tmp_path, input=paths, capture_output=True, text=True, check=True
    )
    assert set(ignored.stdout.split()) == kept
    assert not [folder for folder in ("data", "models", "reports") if (ROOT / folder / ".gitignore").exists()]


@pytest.fixture(scope="module")
def project(first_run, tmp_path_factory) -> Project:
    finished, printed = first_run
    assert stages_run(printed) == list(STAGES)
    return finished.copied(tmp_path_factory.mktemp("reruns") / "project")


def lock(project: Project) -> dict[str, Any]:
    return yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]


@pytest.mark.pipeline
def test_dvc_reruns_what_a_change_asks_for_and_going_back_computes_nothing(project):
    assert project.repro() == []
    before = lock(project)
    project.set_params(train__learning_rate=0.002)
    assert project.repro() == ["train", "evaluate"]
    assert lock(project)["train"]["outs"] != before["train"]["outs"]
    project.set_params(train__learning_rate=0.004)
    assert project.repro() == []
    assert lock(project) == before


@pytest.mark.pipeline
def test_a_training_starts_from_the_run_whose_model_it_replaces_and_not_again_from_its_own(project, tmp_path):
    starting = project.copied(tmp_path / "project")
    before = starting.run_record()
    starting.set_params(train__init=f"runs:/{before['mlflow_run_id']}", train__learning_rate=1e-9)
    assert starting.repro() == ["train", "evaluate"]
    after = starting.run_record()
    assert after["base"]["sha256"] == before["model_sha256"] != after["model_sha256"]
    old, new = (read_json(own.folder / "reports/train/metrics.json")["best_val_mae"] for own in (project, starting))
    assert new == pytest.approx(old, abs=2e-4)  # where that training ended
    assert starting.repro() == []


@pytest.mark.pipeline
def test_what_decides_no_weight_does_not_train_again(project):
    params = (project.folder / "params.yaml").read_text()
    project.set_params(monitor__log_every=1, monitor__validation_images=8, machine__checkpoint_every=7)
    project.set_params(validate__min_train_images=20)  # which passes, as 16 does: the report says so in other words
    assert project.repro() == ["validate"]
    (project.folder / "params.yaml").write_text(params)
    assert project.repro() == []


@pytest.mark.pipeline
def test_device_and_tracking_address_are_no_reason_to_rerun(project):
    environment = {"LATENTLOOM_DEVICE": "cpu", "MLFLOW_TRACKING_URI": "sqlite:///elsewhere.db"}
    result = project.run("env", *(f"{key}={value}" for key, value in environment.items()), "dvc", "status")
    assert result.stdout.split() == ["find_sources:", "always", "changed"]


@pytest.mark.pipeline
def test_a_wrong_param_is_rejected_at_once_and_changes_nothing(project, monkeypatch):
    expected = "train.learning_rat = 0.1: unknown key (did you mean learning_rate?)"
    params = (project.folder / "params.yaml").read_text()
    before = lock(project)
    try:
        project.set_params(train__learning_rat=0.1)
        result = project.run("dvc", "repro", check=False)
        assert result.returncode != 0
        assert expected in result.stdout + result.stderr
        monkeypatch.chdir(project.folder)
        checked = CliRunner().invoke(app, ["check"])
        assert checked.exit_code == 1
        assert expected in checked.output
    finally:
        (project.folder / "params.yaml").write_text(params)
    project.repro()
    assert lock(project) == before
