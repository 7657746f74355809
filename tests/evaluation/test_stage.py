"""The stage `evaluate` by hand: an MLflow run each, and not twice the same; with a sweep, chart and table too."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from stages import finish

from latentloom.tracking.delivery import PARENT_TAG

pytestmark = pytest.mark.pipeline


@pytest.fixture
def project(finished, tmp_path):
    return finished.copied(tmp_path / "project")


def evaluate(project, **settings):
    path = project.folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["evaluate"] |= settings
    path.write_text(yaml.safe_dump(params))
    finish(project, "evaluate")


def test_a_sweep_is_left_in_the_reports_and_in_mlflow_and_goes_when_it_is_no_longer_asked_for(project):
    plots = project.folder / "reports/evaluate/plots"
    left = {path.name for path in plots.iterdir()}
    evaluate(project, sampler="dpmpp_2m", sweep={"class_guidance": [1, 3], "diffusion_steps": [2, 4]})
    assert {path.name for path in plots.iterdir()} == left | {"sweep.png", "sweep.csv"}
    assert len((plots / "sweep.csv").read_text().splitlines()) == 1 + 4
    first = (plots / "sweep.png").read_bytes()

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    run, as_shipped, training = client.search_runs(["1"])
    assert run.data.tags[PARENT_TAG] == as_shipped.data.tags[PARENT_TAG] == training.info.run_id
    assert [own.data.params["evaluate.sampler"] for own in (run, as_shipped)] == ["dpmpp_2m", "ddim"]
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"samples.png", "sweep.png", "sweep.csv"} <= artifacts
    images = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]
    assert any(path.startswith("images/sweep") for path in images)
    settings = json.loads(Path(client.download_artifacts(run.info.run_id, "sampling.json")).read_text())
    assert settings["sampler"] == "dpmpp_2m"

    evaluate(project)
    assert (plots / "sweep.png").read_bytes() == first
    assert len(client.search_runs(["1"])) == 3  # the same again is the same run
    evaluate(project, sweep=None)
    assert {path.name for path in plots.iterdir()} == left
