"""What a training's run in MLflow says of its origin and its model."""

import json
from dataclasses import asdict, replace

import pytest
from logged_runs import all_stored, artifacts, client
from projects import tiny_params

from latentloom.params import Params
from latentloom.tracking.git import Git
from latentloom.tracking.provenance import Provenance, record_model, record_start
from latentloom.tracking.runs import new_run

PROVENANCE = Provenance(
    commit="0123456789abcdef" * 2,
    dirty=True,
    branch="main",
    experiment="brave-fox",
    user="ada",
    inputs={"latents": "1" * 64, "text": "2" * 64, "validation": "3" * 64},
    ingested={"sources": [{"name": "photos"}, {"name": "drawings"}]},
    failed_checks=[],
)
SIZES = {"images": {"training": 1234, "validation": 137}, "digests": {"training": "aa", "validation": "bb"}}


@pytest.fixture
def params() -> Params:
    return Params.model_validate(tiny_params())


def recorded(root, params, provenance, **more):
    with new_run(root) as run:
        record_start(run, params, provenance, **SIZES, device="cpu", **more)
    return client(root).get_run(run.id)


def test_a_run_has_a_handful_of_tags_the_params_that_decide_both_splits_and_all_else_in_one_file(
    project_root, params, monkeypatch
):
    monkeypatch.setattr(Git, "code_diff", lambda own: "a diff")
    run = recorded(project_root, params, PROVENANCE)
    own = {key: value for key, value in run.data.tags.items() if key not in ("latentloom.key", "mlflow.runName")}
    assert own.pop("mlflow.note.content")
    assert own == {
        "mlflow.source.git.commit": PROVENANCE.commit,
        "git.dirty": "true",
        "git.branch": "main",
        "dvc.experiment": "brave-fox",
        "mlflow.user": "ada",
        "device": "cpu",
    }
    files = artifacts(project_root, run.info.run_id)
    assert json.loads((files / "provenance.json").read_text()) == asdict(PROVENANCE)
    assert (files / "code.diff").read_text() == "a diff"
    assert run.data.params["seed"] == str(params.seed)
    assert run.data.params["train.learning_rate"] == str(params.train.learning_rate)
    assert run.data.params["model.widths"] == str(list(params.model.widths))
    sections = {name.partition(".")[0] for name in run.data.params}
    assert sections == {"seed", "ingest", "encode_images", "encode_text", "model", "diffusion", "train"}
    assert {
        (own.dataset.name, own.dataset.digest, own.dataset.profile, own.tags[0].value)
        for own in run.inputs.dataset_inputs
    } == {
        ("photos+drawings-training", "aa", '{"num_rows": 1234}', "training"),
        ("photos+drawings-validation", "bb", '{"num_rows": 137}', "validation"),
    }


def test_what_is_not_known_is_left_out(project_root, params):
    """As in a container whose user id has no name, outside git."""
    run = recorded(project_root, params, Provenance())
    own = {key for key in run.data.tags if not key.startswith("latentloom.")}
    assert own == {"device", "mlflow.note.content", "mlflow.runName"}
    assert [path.name for path in artifacts(project_root, run.info.run_id).iterdir()] == ["provenance.json"]
    assert "1,234 images" in run.data.tags["mlflow.note.content"]
    assert "None" not in run.data.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("failed", "sentence"),
    [([], "Validation: all checks passed."), (["enough images"], "Validation failed: **enough images**.")],
)
def test_the_description_tells_data_code_and_validation(project_root, params, failed, sentence):
    text = recorded(project_root, params, replace(PROVENANCE, failed_checks=failed)).data.tags["mlflow.note.content"]
    assert text.startswith("**1,234 images of photos and drawings** (137 held out), ")
    assert "commit `0123456789` of branch `main`, with local changes (`code.diff`)" in text
    assert "`dvc exp apply brave-fox`" in text
    assert text.endswith(sentence)


def test_the_finished_model_is_recorded_beside_what_it_came_from(project_root, params):
    model = project_root / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with new_run(project_root) as run:
        record_start(run, params, PROVENANCE, **SIZES, device="cpu")
        found = replace(PROVENANCE, model_sha256="c" * 64)
        record_model(run, found, model)
    tags, files = all_stored(project_root, run.id)["tags"], artifacts(project_root, run.id)
    assert tags["model.sha256"] == "c" * 64
    assert tags["mlflow.note.content"].startswith("**1,234 images")
    assert (files / "model/config.json").read_text() == "{}"
    assert json.loads((files / "provenance.json").read_text())["model_sha256"] == "c" * 64
