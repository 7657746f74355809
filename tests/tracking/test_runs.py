"""Tracking: what is logged is in the store, and a store that fails never stops the work."""

import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pandas as pd
import pytest

from latentloom.tracking.lineage import dvc_tags, git_tags, input_tags
from latentloom.tracking.runs import flatten, new_run, reopened_run
from latentloom.tracking.store import tracking_uri


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
    with closing(sqlite3.connect(migrated_store)) as made, closing(sqlite3.connect(tmp_path / "mlflow.db")) as copy:
        made.backup(copy)  # its write-ahead log included
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


@pytest.fixture
def interrupted(root) -> str:
    """The id of a run that logged steps 1 to 5 in a process that was then killed."""

    def until_killed():
        with new_run(root, name="first", tags={"commit": "old", "device": "cpu"}) as run:
            log_training(run, steps=range(1, 6))
            (root / "run_id").write_text(run.id)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=until_killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return (root / "run_id").read_text()


def log_training(run, steps):
    run.log_params({"train": {"steps": 8}})
    for context in ("training", "validation"):
        frame = pd.DataFrame({"id": [context]})
        run.log_dataset(frame, name=f"mine-{context}", source="data", digest=f"{context:.8}", context=context)
    for step in steps:
        run.log_metrics({"train/mae": 1.0 / step, "train/learning_rate": 0.1}, step)
        if step % 2 == 0:
            run.log_metrics({"val/mae": 2.0 / step}, step)
            run.log_image(np.zeros((4, 4, 3), dtype=np.uint8), "samples", step)


def logged_steps(root, run_id, key):
    return [metric.step for metric in client(root).get_metric_history(run_id, key)]


def logged_pictures(root, run_id):
    paths = [artifact.path for artifact in client(root).list_artifacts(run_id, "images")]
    return sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in paths if path.endswith(".png"))


def test_a_training_that_was_killed_and_goes_on_is_one_run_without_gaps_or_doubled_steps(root, interrupted):
    with new_run(root, name="second", tags={"commit": "new"}, run_id=interrupted) as run:
        log_training(run, steps=range(4, 9))
    assert run.id == interrupted
    assert logged_steps(root, run.id, "train/mae") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged_steps(root, run.id, "train/learning_rate") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged_steps(root, run.id, "val/mae") == [2, 4, 6, 8]
    assert logged_pictures(root, run.id) == [2, 4, 6, 8]
    stored = client(root).get_run(run.id)
    assert sorted(given.dataset.name for given in stored.inputs.dataset_inputs) == ["mine-training", "mine-validation"]
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "first"
    assert (stored.data.tags["commit"], stored.data.tags["device"]) == ("new", "cpu")
    assert stored.data.params == {"train.steps": "8"}
    others = {found.info.run_id for found in client(root).search_runs([stored.info.experiment_id])} - {run.id}
    assert len(others) == 1  # the one that made the store


def test_a_reopened_run_is_running_until_it_ends(root):
    with pytest.raises(ValueError), new_run(root, tags={}) as run:
        raise ValueError
    with new_run(root, tags={}, run_id=run.id):
        assert client(root).get_run(run.id).info.status == "RUNNING"
    assert client(root).get_run(run.id).info.status == "FINISHED"


def test_a_param_that_a_run_holds_stays_as_it_is_without_a_warning(root, interrupted):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, tags={}, run_id=interrupted) as run:
            run.log_params({"train": {"steps": 9, "compile": True}})
    assert client(root).get_run(run.id).data.params == {"train.steps": "8", "train.compile": "True"}


def test_a_step_that_never_arrived_is_filled_in(root):
    with new_run(root, tags={}) as run:
        for step in (1, 2, 4):
            run.log_metrics({"train/mae": 1.0}, step)
    with new_run(root, tags={}, run_id=run.id) as again:
        for step in (2, 3, 4, 5):
            again.log_metrics({"train/mae": 1.0}, step)
    assert sorted(logged_steps(root, run.id, "train/mae")) == [1, 2, 3, 4, 5]


def test_a_picture_that_a_kill_cut_short_is_drawn_again(root, interrupted):
    pictures = Path(urlparse(client(root).get_run(interrupted).info.artifact_uri).path) / "images"
    (small,) = pictures.glob("samples*step?4?*compressed.webp")
    small.unlink()
    with new_run(root, tags={}, run_id=interrupted) as run:
        log_training(run, steps=range(2, 6))
    for step in (2, 4):
        assert len(list(pictures.glob(f"samples*step?{step}?*compressed.webp"))) == 1


def test_a_training_whose_run_was_deleted_gets_a_new_one(root, interrupted):
    client(root).delete_run(interrupted)
    with new_run(root, tags={}, run_id=interrupted) as run:
        log_training(run, steps=range(4, 6))
    assert run.id not in (None, interrupted)
    assert logged_steps(root, run.id, "train/mae") == [4, 5]


def test_a_training_whose_store_was_replaced_gets_a_new_run(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, tags={}, run_id="0" * 32) as run:
            run.log_metrics({"train/mae": 1.0}, 1)
    assert run.id not in (None, "0" * 32)


def test_an_evaluation_that_is_run_again_logs_again(root):
    with new_run(root, tags={}) as run:
        run.log_metrics({"train/mae": 0.5}, 10)
    for value in (0.7, 0.6):
        with reopened_run(root, run.id) as again:
            again.log_metrics({"evaluate/val_mae": value}, 10)
    assert client(root).get_run(run.id).data.metrics["evaluate/val_mae"] == 0.6
    assert len(logged_steps(root, run.id, "evaluate/val_mae")) == 2


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
