"""The stage `evaluate` by hand is a run each; a sweep, and figures beside real images, are in it if asked for."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient
from stages import finish
from tiny_models import save_dinov2, save_whole_clip

from latentloom.evaluation.distribution import BESIDE_REAL
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


def test_what_is_asked_for_is_left_in_the_reports_and_in_mlflow_and_goes_with_the_wish(project, tmp_path):
    plots = project.folder / "reports/evaluate/plots"
    left = {path.name for path in plots.iterdir()}
    assert "noise_curves.png" in left
    encoders = {"features": str(save_dinov2(tmp_path / "dinov2")), "clip": str(save_whole_clip(tmp_path / "clip"))}
    sweep = {"class_guidance": [1, 3], "diffusion_steps": [2, 4]}
    evaluate(project, sampler="dpmpp_2m", sweep=sweep, samples=5, **encoders)
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
    assert all(any(path.startswith(f"images/{name}") for path in images) for name in ("sweep", "noise_curves"))
    figures = json.loads((project.folder / "reports/evaluate/metrics.json").read_text())
    for name in BESIDE_REAL:
        assert run.data.metrics[f"evaluate/{name}"] == figures[name]
    assert "evaluate/seconds/fid" in run.data.metrics and not any("seconds" in name for name in figures)
    settings = json.loads(Path(client.download_artifacts(run.info.run_id, "sampling.json")).read_text())
    assert settings["sampler"] == "dpmpp_2m"

    evaluate(project)
    assert (plots / "sweep.png").read_bytes() == first
    assert len(client.search_runs(["1"])) == 3  # the same again is the same run
    evaluate(project, sweep=None, features=None, clip=None)
    assert "fid" not in json.loads((project.folder / "reports/evaluate/metrics.json").read_text())
    assert {path.name for path in plots.iterdir()} == left
