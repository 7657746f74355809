"""Delivery: a store that fails, in whatever way, neither stops the work nor loses or doubles anything."""

import json
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from logged_runs import (
    AWAY,
    all_stored,
    artifacts,
    client,
    killed_training,
    log_training,
    logged_images,
    logged_steps,
    wait_until,
)

from latentloom.tracking import delivery
from latentloom.tracking.delivery import Synced, sync
from latentloom.tracking.journal import journals
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import experiment_id, open_client

WARNING = "MLflow could not be written to"


@pytest.fixture
def away(root, monkeypatch) -> str:
    """The key of a finished run whose store was away."""

    def unreachable(root):
        raise ConnectionError("the store is away")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=WARNING):
        patch.setattr(delivery, "open_client", unreachable)
        with new_run(root, name="patient") as run:
            log_training(run, steps=range(1, 6))
            run.log_file(Path(__file__))
            run.set_tags({"commit": "abc"})
    return run.key


def found_by_key(root, key):
    own = client(root)
    (run,) = own.search_runs([experiment_id(own, root)], f"tags.`{delivery.KEY_TAG}` = '{key}'")
    return run.info.run_id


def warnings_of(root, work) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(warning.message) for warning in caught]


def forget_what_arrived(journal: Path) -> None:
    about = json.loads((journal / "about.json").read_text())
    (journal / "about.json").write_text(json.dumps(about | {"delivered": 0}))


class Failing:
    """A store each of whose calls fails twice before it succeeds: the first is not heard, of the second the answer."""

    def __init__(self, store, calls: Counter):
        self._store, self._calls = store, calls

    def __getattr__(self, name):
        def call(*arguments, **named):
            self._calls[name] += 1
            if self._calls[name] % 3 == 1:
                raise ConnectionError(f"{name} did not arrive")
            answer = getattr(self._store, name)(*arguments, **named)
            if self._calls[name] % 3 == 2:
                raise ConnectionError(f"the answer of {name} was lost")
            return answer

        return call


@pytest.mark.slow
def test_a_store_that_fails_at_every_call_neither_loses_nor_doubles_anything(root, away, monkeypatch):
    with new_run(root) as whole:
        log_training(whole, steps=range(1, 6))
        whole.log_file(Path(__file__))
        whole.set_tags({"commit": "abc"})
    calls = Counter()
    monkeypatch.setattr(delivery, "open_client", lambda root: Failing(client(root), calls))
    for _ in range(1000):
        (synced,) = sync(root)
        if not synced.waits:
            break
    assert {"create_run", "log_batch", "log_image", "log_artifact", "log_inputs", "set_terminated"} <= set(calls)
    assert calls.pop("create_run") == 2  # the run of the lost answer is found by its key
    assert min(calls.values()) >= 3
    assert all_stored(root, found_by_key(root, away)) == all_stored(root, whole.id)
    assert list(journals(root).iterdir()) == []


def test_a_delivery_that_the_journal_does_not_know_of_is_repeated_without_effect_but_for_what_lacked(root):
    def again() -> str:
        shutil.copytree(root / "files", journals(root) / run.key / "files", dirs_exist_ok=True)
        forget_what_arrived(journals(root) / run.key)
        (synced,) = sync(root)
        return synced.message

    def small(step):
        return list((artifacts(root, run.id) / "images").glob(f"samples*step?{step}?*compressed.webp"))

    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        log_training(run, steps=range(1, 6))
        run.log_file(Path(__file__))
        shutil.copytree(journals(root) / run.key / "files", root / "files")
        raise KeyboardInterrupt
    before = all_stored(root, run.id)
    assert again() == "delivered 15 entries"
    assert all_stored(root, run.id) == before
    small(4)[0].unlink()  # as a kill leaves it, which cuts the delivery of an image short
    again()
    assert [len(small(step)) for step in (2, 4)] == [1, 1]


def test_what_is_logged_and_the_state_of_the_machine_arrive_while_the_run_is_running(root, monkeypatch):
    monkeypatch.setattr(delivery, "EVERY", 0.05)
    with new_run(root) as run:
        run.log_metrics({"train/mae": 1.0}, 1)
        wait_until(lambda: run.id and logged_steps(root, run.id, "train/mae") == [1])
        wait_until(lambda: run.id and "system/cpu_utilization_percentage" in client(root).get_run(run.id).data.metrics)
    logged = client(root).get_run(run.id).data.metrics
    assert 0 <= logged["system/cpu_utilization_percentage"] <= 100
    assert 0 < logged["system/system_memory_usage_percentage"] < 100
    assert logged["system/system_memory_usage_megabytes"] > 100
    assert list(journals(root).iterdir()) == []
    assert "tracking" not in {thread.name for thread in threading.enumerate()}


def test_what_mlflow_rejects_is_left_out_with_a_warning_and_the_rest_arrives(root):
    with pytest.warns(UserWarning, match="MLflow rejected params"), new_run(root) as run:
        run.log_params({"not/allowed?": 1})
        run.log_metrics({"train/mae": 1.0}, 1)
    assert logged_steps(root, run.id, "train/mae") == [1]


def test_a_data_set_that_another_run_names_at_the_same_moment_arrives_with_both(root, monkeypatch):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import BAD_REQUEST
    from mlflow.tracking import MlflowClient

    log_inputs, calls = MlflowClient.log_inputs, Counter()

    def second(self, run_id, *arguments):
        calls[run_id] += 1
        if calls[run_id] == 1:  # as MLflow answers: it looked for the data set before the other run had made it
            raise MlflowException("UNIQUE constraint failed: datasets.experiment_id, datasets.name", BAD_REQUEST)
        return log_inputs(self, run_id, *arguments)

    monkeypatch.setattr(MlflowClient, "log_inputs", second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with new_run(root) as run:
            run.log_dataset(name="training", source="data/latents", digest="5dafefcb", rows=10, context="training")
    assert [own.dataset.name for own in client(root).get_run(run.id).inputs.dataset_inputs] == ["training"]


def test_a_metric_that_is_no_number_arrives_once_however_often_it_is_sent(root):
    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        run.log_metrics({"val/mae": float("nan"), "train/mae": 1.0}, 1)
        raise KeyboardInterrupt
    forget_what_arrived(journals(root) / run.key)
    assert [synced.waits for synced in sync(root)] == [False]
    assert [logged_steps(root, run.id, key) for key in ("val/mae", "train/mae")] == [[1], [1]]


def test_a_deleted_run_is_created_again_with_its_whole_curve(root):
    key = killed_training(root, range(1, 6))
    list(sync(root))
    first = found_by_key(root, key)
    client(root).delete_run(first)
    with new_run(root, key=key) as run:
        log_training(run, steps=range(4, 9))
    assert run.id not in (None, first)
    assert logged_steps(root, run.id, "train/mae") == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_of_a_deleted_experiment_waits_until_the_experiment_is_restored(root):
    with new_run(root):
        pass
    own = client(root)
    experiment = experiment_id(own, root)
    own.delete_experiment(experiment)
    restore = rf"`MLFLOW_TRACKING_URI=\S+ mlflow experiments restore -x {experiment}`\) or set MLFLOW_EXPERIMENT_NAME"
    with pytest.warns(UserWarning, match=restore), new_run(root) as run:
        log_training(run, steps=range(1, 6))
    own.restore_experiment(experiment)
    (synced,) = sync(root)
    assert not synced.waits
    assert logged_steps(root, found_by_key(root, run.key), "train/mae") == [1, 2, 3, 4, 5]


def test_a_training_resumed_with_another_store_and_back_is_whole_in_both(root, empty_store, monkeypatch):
    own, other = f"sqlite:///{root / 'own.db'}", f"sqlite:///{root / 'other.db'}"
    for name in ("own.db", "other.db"):
        shutil.copyfile(empty_store, root / name)
    key = None
    for uri, steps in ((own, range(1, 4)), (other, range(3, 6)), (own, range(5, 9))):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(KeyboardInterrupt), new_run(root, key=key) as run:
            key = run.key
            log_training(run, steps)
            raise KeyboardInterrupt
        assert logged_steps(root, run.id, "train/mae") == list(range(1, steps.stop))
    assert logged_images(root, run.id) == [2, 6, 8]  # the files of what `other` had are not kept


def test_a_server_that_is_down_costs_one_warning_and_nothing_is_lost(root, monkeypatch, capsys):
    monkeypatch.setattr(delivery, "EVERY", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)

    def work():
        with new_run(root) as run:
            log_training(run, steps=range(1, 6))
            time.sleep(0.3)  # a few more tries

    (warning,) = warnings_of(root, work)
    (journal,) = journals(root).iterdir()
    assert warning.startswith(WARNING)
    assert str(journal) in warning
    assert "`latentloom sync` delivers them" in capsys.readouterr().err
    (synced,) = sync(root)
    assert synced.waits
    assert " entries still wait: MlflowException: API request to http://127.0.0.1:9" in synced.message
    assert "secret" not in synced.message + warning
    assert not any("secret" in path.read_text() for path in journals(root).rglob("*.json*"))

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    message = "waits for http://127.0.0.1:9: set MLFLOW_TRACKING_URI accordingly"
    assert list(sync(root)) == [Synced(journal.name, message, waits=True)]


@pytest.mark.parametrize("uri", ["sqlite:////dev/null/mlflow.db", "postgresql+psycopg://me:secret@127.0.0.1:9/runs"])
def test_a_database_that_cannot_be_opened_costs_one_warning_and_seconds(root, monkeypatch, caplog, uri):
    if uri.startswith("postgresql"):
        pytest.importorskip("psycopg")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    def work():
        with new_run(root) as run:
            run.log_metrics({"train/mae": 1.0}, 1)

    began = time.monotonic()
    (warning,) = warnings_of(root, work)
    assert time.monotonic() - began < 10
    assert warning.startswith(WARNING)
    assert "secret" not in warning
    assert caplog.messages == []


def test_a_store_that_hangs_holds_up_the_end_of_a_run_for_a_bounded_time(root, monkeypatch, capsys):
    released = threading.Event()
    monkeypatch.setattr(delivery, "PATIENCE", 0.1)
    monkeypatch.setattr(delivery, "open_client", lambda root: released.wait(60) and open_client(root))
    began = time.monotonic()
    with new_run(root) as run:
        run.log_metrics({"train/mae": 1.0}, 1)
    assert time.monotonic() - began < 10
    assert "`latentloom sync` delivers them" in capsys.readouterr().err
    assert [synced.message for synced in sync(root)] == ["still running"]
    released.set()
    wait_until(lambda: "tracking" not in {thread.name for thread in threading.enumerate()})
    assert logged_steps(root, run.id, "train/mae") == [1]


def test_where_mlflow_is_not_installed_the_run_is_delivered_from_elsewhere(root, monkeypatch):
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=WARNING):
        patch.setitem(sys.modules, "mlflow.tracking", None)
        with new_run(root, name="on a bare machine") as run:
            log_training(run, steps=range(1, 6))
    assert list(sync(root)) == [Synced(run.key, "delivered 14 entries")]
    run_id = found_by_key(root, run.key)
    found = client(root).get_run(run_id)
    assert (found.info.run_name, found.info.status) == ("on a bare machine", "FINISHED")
    assert logged_steps(root, run_id, "train/mae") == [1, 2, 3, 4, 5]
    assert logged_images(root, run_id) == [2, 4]


def test_syncing_leaves_a_running_run_alone_and_marks_a_killed_one(root):
    killed = killed_training(root, range(1, 6))
    with new_run(root) as run:
        results = {synced.key: synced for synced in sync(root)}
    assert results[run.key] == Synced(run.key, "still running")
    assert results[killed].message.startswith("delivered ")
    assert client(root).get_run(found_by_key(root, killed)).info.status == "KILLED"


def test_a_journal_that_cannot_be_read_does_not_keep_the_others_from_being_synced(root, away):
    broken = journals(root) / "0"
    broken.mkdir()
    (broken / "about.json").write_text("{")
    first, second = sync(root)
    assert first.waits
    assert first.message.startswith("cannot be read")
    assert second == Synced(away, "delivered 16 entries")
