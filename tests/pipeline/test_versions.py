"""Data and models as versions: pushed, pulled into another clone, tried out as experiments."""

import json
from dataclasses import replace

import pytest

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def project(make_project):
    project = make_project("versions")
    project.repro()
    project.run("git", "add", "-A")
    project.run("git", "commit", "-q", "-m", "First model")
    return project


def test_a_second_clone_pulls_everything_and_has_nothing_to_do(project):
    project.run("dvc", "push", "-q")
    clone = replace(project, folder=project.folder.parent / "clone")
    project.run("git", "clone", "-q", str(project.folder), str(clone.folder))
    clone.run("dvc", "pull", "-q")
    for path in ("models/unet/model.safetensors", "data/latents/00000.safetensors", "data/images/00000.parquet"):
        assert (clone.folder / path).read_bytes() == (project.folder / path).read_bytes()
    assert clone.repro() == []


def test_in_a_clone_that_pulled_only_what_is_added_is_encoded(project):
    clone = replace(project, folder=project.folder.parent / "clone")
    assert not (clone.folder / ".state").exists()
    clone.set_params(ingest__limit=44)
    output = clone.run("dvc", "repro", "encode_images", "encode_text").stdout
    assert "44 latents: encoded 4, reused 40" in output
    assert "reused 0" not in output


def test_an_experiment_changes_a_param_is_tracked_under_its_name_and_can_be_compared(project):
    project.run("dvc", "exp", "run", "-n", "slow-rate", "-S", "train.learning_rate=0.0005")
    shown = project.run("dvc", "exp", "show", "--csv", "--no-pager").stdout
    assert "slow-rate" in shown
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "latentloom"]
    runs = client.search_runs([experiment.experiment_id], "tags.`dvc.experiment` = 'slow-rate'")
    assert [run.data.params["train.learning_rate"] for run in runs] == ["0.0005"]
    project.run("git", "checkout", "-q", "-f", "main")
    project.run("dvc", "checkout", "-q", "-f")


def test_an_experiment_from_the_queue_runs_elsewhere_and_lands_in_the_same_store(project):
    project.run("dvc", "exp", "run", "--queue", "-n", "queued-rate", "-S", "train.learning_rate=0.002")
    before = (project.folder / "reports/train/metrics.json").read_text()
    project.run("dvc", "exp", "run", "--run-all")
    assert (project.folder / "reports/train/metrics.json").read_text() == before
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "latentloom"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`dvc.experiment` = 'queued-rate'")
    assert client.list_artifacts(run.info.run_id, "images")
    assert run.info.artifact_uri.startswith((project.folder / "mlartifacts").as_uri())


def test_an_experiment_in_a_temporary_copy_reuses_what_this_machine_encoded(project):
    project.run("dvc", "exp", "run", "--queue", "-n", "flipped", "-S", "encode_images.flip=true")
    project.run("dvc", "exp", "run", "--run-all")
    project.run("dvc", "exp", "branch", "flipped", "flipped-branch")
    report = json.loads(project.run("git", "show", "flipped-branch:reports/encode_images.json").stdout)
    assert (report["encoded"], report["reused"]) == (40, 40)


def test_the_model_is_an_artifact_of_the_project(project):
    code = "import dvc.repo as r; print(*(a.path for own in r.Repo().artifacts.read().values() for a in own.values()))"
    assert project.run("python", "-c", code).stdout.split() == ["models/unet"]
