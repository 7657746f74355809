"""Tracking: what is logged is in the store, and a store that fails never stops the work."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pandas as pd
import pytest

from latentloom.tracking import delivery, system_metrics
from latentloom.tracking.provenance import dvc_tags, git_tags, input_tags
from latentloom.tracking.runs import flatten, journals, new_run, reopened_run, sync
from latentloom.tracking.store import experiment_id, tracking_uri

NO_SERVER = "MlflowException: API request to http://127.0.0.1:9"


@pytest.fixture(scope="module")
def migrated_store(tmp_path_factory) -> Path:
    """A fresh SQLite store: MLflow needs seconds to make one, so each test gets a copy."""
    folder = tmp_path_factory.mktemp("store")
    with new_run(folder):
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
    with new_run(root, name="a name") as run:
        run.set_tags({"kept": "yes", "dropped": None})
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
    with new_run(root) as run:
        run.log_image(picture, "samples", 100)
        run.log_image(picture, "samples", 200)
    names = [artifact.path for artifact in client(root).list_artifacts(run.id, "images")]
    for step in (100, 200):
        assert any(re.fullmatch(rf"images/samples\W+step\W+{step}\W.*\.png", name) for name in names)


def first_shown_step(root):
    """Of the pictures, in the view that MLflow's page of runs offers."""
    tags = client(root).get_experiment_by_name("latentloom").tags
    view = json.loads(json.loads(tags["mlflow.sharedViewState.latentloom"])["state"])
    (step,) = {chart["step"] for chart in view["compareRunCharts"] if chart["type"] == "IMAGE"}
    return step


def test_mlflows_page_opens_on_the_newest_pictures(root):
    assert first_shown_step(root) == 0
    with new_run(root) as run:
        for step in (100, 200):
            run.log_image(np.zeros((8, 8, 3), dtype=np.uint8), "samples", step)
    assert first_shown_step(root) == 200


def test_where_we_may_not_change_the_experiment_pictures_arrive_all_the_same(root, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def refuse(*arguments):
        raise MlflowException("not yours")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root) as run:
            run.log_image(np.zeros((8, 8, 3), dtype=np.uint8), "samples", 100)
    assert logged_pictures(root, run.id) == [100]


def test_the_data_set_arrives_with_its_digest(root):
    with new_run(root) as run:
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
    with new_run(root) as run:
        run.log_file(Path("note.txt"))
    assert list(elsewhere.iterdir()) == [elsewhere / "note.txt"]
    assert client(root).list_artifacts(run.id)[0].path == "note.txt"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_off_says_so(root, error, status):
    with pytest.raises(error), new_run(root) as run:
        raise error
    assert client(root).get_run(run.id).info.status == status


def test_a_run_is_reopened_and_added_to(root):
    with new_run(root) as run:
        run.log_metrics({"train/mae": 0.5}, 10)
    with reopened_run(root, run.key, run.id) as again:
        again.log_metrics({"evaluate/val_mae": 0.7}, 10)
    assert client(root).get_run(run.id).data.metrics == {"train/mae": 0.5, "evaluate/val_mae": 0.7}


@pytest.fixture
def interrupted(root) -> str:
    """The key of a run that logged steps 1 to 5 in a process that was then killed."""

    def until_killed():
        with new_run(root, name="first") as run:
            run.set_tags({"commit": "old", "device": "cpu"})
            log_training(run, steps=range(1, 6))
            (root / "key").write_text(run.key)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=until_killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return (root / "key").read_text()


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


def events(root, key):
    return [json.loads(line) for line in (journals(root) / key / "events.jsonl").read_text().splitlines()]


def about(root, key):
    return json.loads((journals(root) / key / "about.json").read_text())


def everything(root, run_id):
    run, artifacts = client(root).get_run(run_id), Path(urlparse(client(root).get_run(run_id).info.artifact_uri).path)
    metrics = [
        (metric.key, metric.step, metric.timestamp, metric.value)
        for key in run.data.metrics
        for metric in client(root).get_metric_history(run_id, key)
    ]
    files = sorted(str(path) for path in artifacts.rglob("*"))
    return metrics, run.data.params, run.data.tags, [given.dataset.name for given in run.inputs.dataset_inputs], files


def wait_until(happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged_steps(root, run_id, key):
    return [metric.step for metric in client(root).get_metric_history(run_id, key)]


def logged_pictures(root, run_id):
    paths = [artifact.path for artifact in client(root).list_artifacts(run_id, "images")]
    return sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in paths if path.endswith(".png"))


def test_a_training_that_was_killed_and_goes_on_is_one_run_without_gaps_or_doubled_steps(root, interrupted):
    with new_run(root, name="second", key=interrupted) as run:
        run.set_tags({"commit": "new"})
        log_training(run, steps=range(4, 9))
    assert run.key == interrupted
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


@pytest.mark.fault
def test_four_processes_that_meet_at_a_fresh_store_all_arrive_whole(tmp_path, monkeypatch):
    """The first to open it migrates it; without a lock, three of four crashed in that."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fork = multiprocessing.get_context("fork")
    at_once = fork.Barrier(4)

    def log(number):
        at_once.wait()
        with new_run(tmp_path, name=f"process {number}") as run:
            log_training(run, steps=range(1, 31))
            run.log_metrics({"number": number}, 1)

    processes = [fork.Process(target=log, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    own = client(tmp_path)
    assert sorted(found.name for found in own.search_experiments()) == ["Default", "latentloom"]
    runs = own.search_runs([experiment_id(own, tmp_path)])
    assert sorted(run.info.run_name for run in runs) == [f"process {number}" for number in range(4)]
    for run in runs:
        assert (run.info.status, run.data.params) == ("FINISHED", {"train.steps": "8"})
        assert run.info.run_name == f"process {run.data.metrics['number']:.0f}"
        assert logged_steps(tmp_path, run.info.run_id, "train/mae") == list(range(1, 31))
        assert logged_steps(tmp_path, run.info.run_id, "val/mae") == list(range(2, 31, 2))
        assert logged_pictures(tmp_path, run.info.run_id) == list(range(2, 31, 2))
        assert len(run.inputs.dataset_inputs) == 2
    assert list(journals(tmp_path).iterdir()) == []


def test_a_run_that_goes_on_is_running_until_it_ends(root, interrupted, monkeypatch):
    monkeypatch.setattr(delivery, "EVERY", 0.05)
    with new_run(root, key=interrupted) as run:
        wait_until(lambda: run.id and client(root).get_run(run.id).info.status == "RUNNING")
    assert client(root).get_run(run.id).info.status == "FINISHED"


def test_what_is_logged_arrives_while_the_run_goes_on(root, monkeypatch):
    monkeypatch.setattr(delivery, "EVERY", 0.05)
    with new_run(root) as run:
        run.log_metrics({"train/mae": 1.0}, 1)
        wait_until(lambda: run.id and logged_steps(root, run.id, "train/mae") == [1])


def test_a_param_that_a_run_holds_stays_as_it_is_without_a_warning(root, interrupted):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, key=interrupted) as run:
            run.log_params({"train": {"steps": 9, "compile": True}})
    assert client(root).get_run(run.id).data.params == {"train.steps": "8", "train.compile": "True"}


def test_what_mlflow_refuses_is_left_out_with_a_warning_and_the_rest_arrives(root):
    with pytest.warns(UserWarning, match="MLflow refused params"), new_run(root) as run:
        run.log_params({"not/allowed?": 1})
        run.log_metrics({"train/mae": 1.0}, 1)
    assert logged_steps(root, run.id, "train/mae") == [1]


def test_a_kill_in_the_middle_of_a_delivery_neither_loses_nor_doubles_anything(root, monkeypatch):
    """The store has it all, but the journal does not know: as when the answer was lost."""
    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        log_training(run, steps=range(1, 6))
        run.log_file(Path(__file__))
        raise KeyboardInterrupt
    before = everything(root, run.id)
    (journals(root) / run.key / "delivered").write_text("0")
    assert [said for _, said in sync(root)] == [f"delivered {len(events(root, run.key))} entries"]
    assert everything(root, run.id) == before


@pytest.mark.parametrize("cut", range(0, 200, 13))
def test_a_journal_cut_short_anywhere_is_taken_up(root, cut):
    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        log_training(run, steps=range(1, 6))
        raise KeyboardInterrupt
    path = journals(root) / run.key / "events.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    with new_run(root, key=run.key) as again:
        log_training(again, steps=range(1, 9))
    assert sorted(set(logged_steps(root, again.id, "train/mae"))) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_picture_that_a_kill_cut_short_is_drawn_again(root, interrupted):
    def small(step):
        pictures = Path(urlparse(client(root).get_run(run.id).info.artifact_uri).path) / "images"
        return list(pictures.glob(f"samples*step?{step}?*compressed.webp"))

    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        log_training(run, steps=range(1, 6))
        delivered = set(events(root, run.key)[0])  # the journal is readable meanwhile
        assert "kind" in delivered
        shutil.copytree(journals(root) / run.key / "files", root / "files")
        raise KeyboardInterrupt
    small(4)[0].unlink()
    (journals(root) / run.key / "delivered").write_text("0")
    shutil.copytree(root / "files", journals(root) / run.key / "files", dirs_exist_ok=True)
    list(sync(root))
    assert [len(small(step)) for step in (2, 4)] == [1, 1]


def test_a_run_that_was_deleted_is_made_anew_with_its_whole_curve(root, interrupted):
    list(sync(root))
    first = about(root, interrupted)["mlflow_run_id"]
    client(root).delete_run(first)
    with new_run(root, key=interrupted) as run:
        log_training(run, steps=range(4, 9))
    assert run.id not in (None, first)
    assert logged_steps(root, run.id, "train/mae") == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_training_whose_journal_is_gone_gets_a_new_run(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, key="0" * 32) as run:
            run.log_metrics({"train/mae": 1.0}, 1)
    assert logged_steps(root, run.id, "train/mae") == [1]


def test_an_evaluation_that_is_run_again_logs_again(root):
    with new_run(root) as run:
        run.log_metrics({"train/mae": 0.5}, 10)
    for value in (0.7, 0.6):
        with reopened_run(root, run.key, run.id) as again:
            again.log_metrics({"evaluate/val_mae": value}, 10)
    assert client(root).get_run(run.id).data.metrics["evaluate/val_mae"] == 0.6
    assert len(logged_steps(root, run.id, "evaluate/val_mae")) == 2


def test_adding_to_a_run_that_the_store_does_not_have_costs_a_warning_and_leaves_nothing(root):
    with pytest.warns(UserWarning, match="MLflow has no run 0000"), reopened_run(root, "0" * 32, "1" * 32) as run:
        run.log_metrics({"a": 1.0}, 1)
    assert list(journals(root).iterdir()) == []


def test_a_delivered_run_leaves_no_journal_and_no_thread(root):
    with new_run(root) as run:
        log_training(run, steps=range(1, 6))
    assert list(journals(root).iterdir()) == []
    assert {thread.name for thread in threading.enumerate()} & {"tracking", "system-metrics"} == set()


def test_a_server_that_is_down_costs_one_warning_and_nothing_is_lost(root, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with new_run(root, name="patient") as run:
            log_training(run, steps=range(1, 6))
    assert run.id is None
    (warning,) = [str(each.message) for each in caught if "MLflow could not be written to" in str(each.message)]
    assert str(journals(root) / run.key) in warning
    assert "`latentloom sync` delivers them" in capsys.readouterr().err
    ((_, said),) = sync(root)
    assert said.startswith(f"{len(events(root, run.key))} entries still wait: {NO_SERVER}")
    assert "secret" not in said + warning
    assert not any("secret" in path.read_text() for path in journals(root).rglob("*.json*"))

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    ((key, said),) = sync(root)
    assert (key, said) == (run.key, "waits for http://127.0.0.1:9: set MLFLOW_TRACKING_URI accordingly")


def test_where_mlflow_is_not_installed_the_run_is_delivered_from_elsewhere(root, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="MLflow could not be written to"):
        patch.setitem(sys.modules, "mlflow.tracking", None)
        with new_run(root, name="on a bare machine") as run:
            log_training(run, steps=range(1, 6))
    ((key, said),) = sync(root)
    (found,) = client(root).search_runs([experiment_id(client(root), root)], f"tags.`{delivery.KEY_TAG}` = '{key}'")
    assert said == "delivered 14 entries"
    assert (found.info.run_name, found.info.status) == ("on a bare machine", "FINISHED")
    assert logged_steps(root, found.info.run_id, "train/mae") == [1, 2, 3, 4, 5]
    assert logged_pictures(root, found.info.run_id) == [2, 4]


def test_syncing_leaves_a_run_that_goes_on_alone_and_ends_one_that_was_killed(root, interrupted):
    with new_run(root) as run:
        said = dict(sync(root))
    assert said[run.key] == "still running"
    assert said[interrupted].startswith("delivered ")
    status = client(root).get_run(about(root, interrupted)["mlflow_run_id"]).info.status
    assert status == "KILLED"


def test_a_disk_that_takes_no_journal_costs_a_warning(root):
    (root / ".state").mkdir()
    (root / ".state" / "tracking").write_text("not a folder")
    with pytest.warns(UserWarning, match="nothing of this run is tracked"), new_run(root) as run:
        run.log_metrics({"a": 1.0}, 1)
    assert run.key is None


def test_what_the_machine_does_is_logged_and_goes_on_after_a_kill(root, monkeypatch):
    monkeypatch.setattr(system_metrics, "EVERY", 0.05)
    with new_run(root) as run:
        wait_until(lambda: any("system/" in json.dumps(event) for event in events(root, run.key)))
    logged = client(root).get_run(run.id).data.metrics
    assert 0 <= logged["system/cpu_utilization_percentage"] <= 100
    assert logged["system/system_memory_usage_megabytes"] > 0


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
