"""Tracking: what is logged is in the store, and a store that fails never stops the work."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latentloom.tracking.lineage import dvc_tags, git_tags, input_tags
from latentloom.tracking.runs import flatten, new_run, reopened_run, tracking_uri


@pytest.fixture(scope="module")
def migrated_store(tmp_path_factory) -> Path:
    """A fresh SQLite store: MLflow needs seconds to make one, so each test gets a copy."""
    folder = tmp_path_factory.mktemp("store")
    with new_run(folder, tags={}):
        pass
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path, migrated_store, monkeypatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(migrated_store.read_bytes())
    return tmp_path


def client(root):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri(root))


def test_params_metrics_and_tags_arrive(root):
    with new_run(root, name="a name", tags={"kept": "yes", "dropped": None}) as run:
        run.log_params({"train": {"steps": 5, "prompts": ["a", "b"]}, "seed": 0})
        run.log_metrics({"train/mae": 0.5, "val/mae": 0.6}, 10)
        run.log_metrics({"train/mae": 0.4}, 20)
    stored = client(root).get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a name"
    assert stored.data.params == {"train.steps": "5", "train.prompts": "['a', 'b']", "seed": "0"}
    assert stored.data.tags["kept"] == "yes"
    assert "dropped" not in stored.data.tags
    history = client(root).get_metric_history(run.id, "train/mae")
    assert [(metric.step, metric.value) for metric in history] == [(10, 0.5), (20, 0.4)]


def test_pictures_arrive_under_their_key_and_step(root):
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    with new_run(root, tags={}) as run:
        run.log_image(picture, "samples", 100)
        run.log_image(picture, "samples", 200)
    names = [artifact.path for artifact in client(root).list_artifacts(run.id, "images")]
    for step in (100, 200):
        assert any(re.fullmatch(rf"images/samples\W+step\W+{step}\W.*\.png", name) for name in names)


def test_the_data_set_arrives_with_its_digest(root):
    with new_run(root, tags={}) as run:
        frame = pd.DataFrame({"id": ["a"], "caption": ["an apple"]})
        run.log_dataset(frame, name="mine", source="data/latents", digest="0123456789abcdef", context="training")
    (given,) = client(root).get_run(run.id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("mine", "0123456789abcdef")
    assert given.tags[0].value == "training"
    assert "caption" in given.dataset.schema


def test_artifacts_lie_in_the_project_by_absolute_path(root, monkeypatch, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (elsewhere / "note.txt").write_text("hello")
    with new_run(root, tags={}) as run:
        run.log_file(Path("note.txt"))
    assert list(elsewhere.iterdir()) == [elsewhere / "note.txt"]
    assert client(root).list_artifacts(run.id)[0].path == "note.txt"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_off_says_so(root, error, status):
    with pytest.raises(error), new_run(root, tags={}) as run:
        raise error
    assert client(root).get_run(run.id).info.status == status


def test_a_run_is_reopened_and_added_to(root):
    with new_run(root, tags={}) as run:
        run.log_metrics({"train/mae": 0.5}, 10)
    with reopened_run(root, run.id) as again:
        again.log_metrics({"evaluate/val_mae": 0.7}, 10)
    assert client(root).get_run(run.id).data.metrics == {"train/mae": 0.5, "evaluate/val_mae": 0.7}


def test_a_run_that_the_store_does_not_have_costs_a_warning(root):
    with pytest.warns(UserWarning, match="MLflow could not be written to"), reopened_run(root, "0" * 32) as run:
        run.log_metrics({"a": 1.0}, 1)


def test_a_server_that_is_down_costs_one_warning_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with new_run(tmp_path, tags={}) as run:
            run.log_metrics({"a": 1.0}, 1)
            run.log_image(np.zeros((4, 4, 3), dtype=np.uint8), "samples", 1)
    assert run.id is None
    assert len([warning for warning in caught if "MLflow could not be written to" in str(warning.message)]) == 1


def test_where_mlflow_is_not_installed_the_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.warns(UserWarning, match="MLflow could not be written to"), new_run(tmp_path, tags={}) as run:
        run.log_metrics({"a": 1.0}, 1)


def test_an_address_in_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///somewhere.db")
    assert tracking_uri(tmp_path) == "sqlite:///somewhere.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"


def test_nested_params_are_flattened_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_the_commit_and_a_dirty_tree_are_told(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q", "-b", "main")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert git_tags(tmp_path) == {
        "mlflow.source.git.commit": git("rev-parse", "HEAD").strip(),
        "git.dirty": "false",
        "git.branch": "main",
    }
    (tmp_path / "file").write_text("2")
    assert git_tags(tmp_path)["git.dirty"] == "true"


def test_outside_git_there_is_no_commit(tmp_path):
    assert git_tags(tmp_path)["mlflow.source.git.commit"] is None


def test_the_experiment_of_dvc_and_the_inputs_hashes_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-fox")
    assert dvc_tags()["dvc.experiment"] == "brave-fox"
    (tmp_path / "file").write_bytes(b"abc")
    assert input_tags({"x": tmp_path / "file"}) == {
        "input.x": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
