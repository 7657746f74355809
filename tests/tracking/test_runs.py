"""A run: what is logged is in the store, once, also when its training was killed and resumed."""

import hashlib
import multiprocessing
import re
import warnings
from pathlib import Path

import pytest
from logged_runs import (
    IMAGE,
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
from latentloom.tracking.journal import journals
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import experiment_id


def test_params_metrics_tags_images_and_data_sets_arrive(root):
    with new_run(root, name="a name") as run:
        run.set_tags({"kept": "yes", "dropped": None})
        run.log_params({"train": {"steps": 5, "prompts": ["a", "b"]}, "seed": 0})
        run.log_metrics({"train/mae": 0.5, "val/mae": 0.6}, 10)
        run.log_metrics({"train/mae": 0.4}, 20)
        for step in (100, 200):
            run.log_image(IMAGE, "samples", step)
        run.log_dataset(name="mine", source="data/latents", digest="0123456789abcdef", rows=7, context="training")
    found = client(root).get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a name"
    assert found.data.params == {"train.steps": "5", "train.prompts": "['a', 'b']", "seed": "0"}
    assert found.data.tags["kept"] == "yes"
    assert "dropped" not in found.data.tags
    assert all_stored(root, run.id)["metrics"] == {"train/mae": [(10, 0.5), (20, 0.4)], "val/mae": [(10, 0.6)]}
    names = [artifact.path for artifact in client(root).list_artifacts(run.id, "images")]
    for step in (100, 200):
        assert any(re.fullmatch(rf"images/samples\W+step\W+{step}\W.*\.png", name) for name in names)
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("mine", "0123456789abcdef")
    assert given.dataset.profile == '{"num_rows": 7}'
    assert given.tags[0].value == "training"


def test_each_source_of_a_list_is_a_param_and_long_values_that_differ_at_their_end_do_so_in_mlflow(root):
    folders = [f"/data/{'a' * 200}/{number}" for number in range(12)]
    sources = [{"source": "folder", "path": path, "name": None, "weight": 1.0} for path in folders]
    with new_run(root) as run:
        run.log_params({"ingest": {"source": sources}, "a": "x" * 10_000 + "a", "b": "x" * 10_000 + "b"})
    params = client(root).get_run(run.id).data.params
    listed = {f"ingest.source.{n}": f"source folder, path {path}, weight 1.0" for n, path in enumerate(folders, 1)}
    assert params.items() >= listed.items()
    assert params.keys() == {*listed, "a", "b"}
    digest = hashlib.sha256(b"x" * 10_000 + b"a").hexdigest()
    assert params["a"] == "x" * (500 - 25) + f"… sha256 {digest[:16]}"
    assert params["a"] != params["b"]


def test_more_metrics_than_mlflow_takes_per_request_arrive(root):
    with new_run(root) as run:
        for step in range(100):
            run.log_metrics({f"metric {number}": number for number in range(36)}, step)
    assert logged_steps(root, run.id, "metric 35") == list(range(100))


def test_files_and_texts_become_artifacts_in_the_project_whatever_the_current_folder(root, monkeypatch):
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Path("note.txt").write_text("hello")
    with new_run(root) as run:
        run.log_file(Path("note.txt"), "notes")
        run.log_text("a\r\n\udcff", "diff.txt")  # as git gives a byte that is not UTF-8
        Path("note.txt").write_text("changed later")
    files = artifacts(root, run.id)
    assert files.is_relative_to(root / "mlartifacts")
    assert (files / "notes/note.txt").read_text() == "hello"
    assert (files / "diff.txt").read_bytes() == b"a\r\n\xff"
    assert [path.name for path in elsewhere.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_the_status_of_a_run_tells_how_it_broke_off(root, error, status):
    with pytest.raises(error), new_run(root) as run:
        raise error
    assert client(root).get_run(run.id).info.status == status


def test_a_killed_and_resumed_training_is_one_run_without_gaps_or_doubled_steps(root):
    key = killed_training(root, range(1, 6), commit="old", device="cpu")
    with new_run(root, name="second", key=key) as run:
        run.set_tags({"commit": "new"})
        log_training(run, steps=range(4, 9))
    assert run.key == key
    assert logged_steps(root, run.id, "train/mae") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged_steps(root, run.id, "train/learning_rate") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged_steps(root, run.id, "val/mae") == [2, 4, 6, 8]
    assert logged_images(root, run.id) == [2, 4, 6, 8]
    found = client(root).get_run(run.id)
    assert sorted(given.dataset.name for given in found.inputs.dataset_inputs) == ["mine-training", "mine-validation"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert (found.data.tags["commit"], found.data.tags["device"]) == ("new", "cpu")
    assert found.data.params == {"train.steps": "8"}
    assert len(client(root).search_runs([found.info.experiment_id])) == 1


def test_a_resumed_run_is_running_until_it_ends(root, monkeypatch):
    monkeypatch.setattr(delivery, "EVERY", 0.05)
    with new_run(root, key=killed_training(root, range(1, 3))) as run:
        wait_until(lambda: run.id and client(root).get_run(run.id).info.status == "RUNNING")
    assert client(root).get_run(run.id).info.status == "FINISHED"


def test_a_param_of_a_resumed_run_stays_as_it_is_without_a_warning(root):
    key = killed_training(root, range(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, key=key) as run:
            run.log_params({"train": {"steps": 9, "compile": True}})
    assert client(root).get_run(run.id).data.params == {"train.steps": "8", "train.compile": "True"}


def test_a_training_whose_journal_is_gone_gets_a_new_run(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root, key="0" * 32) as run:
            run.log_metrics({"train/mae": 1.0}, 1)
    assert logged_steps(root, run.id, "train/mae") == [1]


@pytest.mark.parametrize("cut", range(0, 200, 29))
def test_a_run_is_resumed_from_a_journal_cut_short_anywhere(root, cut):
    key = killed_training(root, range(1, 6))
    path = journals(root) / key / "events.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    with new_run(root, key=key) as run:
        log_training(run, steps=range(1, 9))
    assert logged_steps(root, run.id, "train/mae") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged_images(root, run.id) == [2, 4, 6, 8]


def test_a_line_of_the_journal_that_a_power_cut_broke_costs_that_line_alone(root):
    key = killed_training(root, range(1, 6))
    path = journals(root) / key / "events.jsonl"
    lines = path.read_bytes().split(b"\n")
    (broken,) = [number for number, line in enumerate(lines) if b'"step": 3' in line]
    lines[broken] = b"\x00" * len(lines[broken])
    path.write_bytes(b"\n".join(lines))
    with new_run(root, key=key) as run:
        log_training(run, steps=range(3, 9))
    assert sorted(logged_steps(root, run.id, "train/mae")) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_names_with_separators_of_lines_or_that_are_not_utf8_survive_resuming(root):
    names = {"a": "line\u2028separator", "b": "next\u0085line", "c": "carriage\rreturn", "d": "two\nlines"}
    with pytest.raises(KeyboardInterrupt), new_run(root) as run:
        run.set_tags(names | {"e": "caf\udce9"})
        raise KeyboardInterrupt
    with new_run(root, key=run.key) as again:
        again.log_metrics({"train/mae": 1.0}, 1)
    assert client(root).get_run(again.id).data.tags.items() >= (names | {"e": "caf?"}).items()
    assert logged_steps(root, again.id, "train/mae") == [1]


def test_a_disk_that_takes_no_journal_costs_one_warning(root):
    (root / ".state").mkdir()
    (root / ".state" / "tracking").write_text("not a folder")
    with pytest.warns(UserWarning, match="nothing of this run is tracked"), new_run(root) as run:
        run.log_metrics({"a": 1.0}, 1)
        run.log_image(IMAGE, "samples", 1)
    assert run.key is None


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
        assert logged_images(tmp_path, run.info.run_id) == list(range(2, 31, 2))
        assert len(run.inputs.dataset_inputs) == 2
    assert list(journals(tmp_path).iterdir()) == []
