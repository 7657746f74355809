"""Which store holds the runs, and how it is opened."""

import shutil
import warnings

import pytest
from logged_runs import artifacts, client, logged_steps

from latentloom.tracking.runs import new_run
from latentloom.tracking.store import first_line, tracking_uri, ui_address, without_credentials


def test_an_address_in_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///somewhere.db")
    assert tracking_uri(tmp_path) == "sqlite:///somewhere.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow.db"


@pytest.mark.slow
def test_a_project_is_tracked_whatever_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "feature%2Fx a%20b?c=1 ü#&'+;"
    root.mkdir()
    (root / "note.txt").write_text("hello")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with new_run(root) as run:
            run.log_metrics({"train/mae": 1.0}, 1)
            run.log_file(root / "note.txt")
    assert (root / "mlflow.db").exists()
    assert logged_steps(root, run.id, "train/mae") == [1]
    assert [artifact.path for artifact in client(root).list_artifacts(run.id)] == ["note.txt"]
    assert (root / "mlartifacts" / run.id / "artifacts" / "note.txt").read_text() == "hello"
    assert artifacts(root, run.id).name == "artifacts"
    assert list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize("files_come_along", [True, False])
def test_the_runs_of_a_copied_project_keep_their_files_in_the_copy(project_root, capsys, files_come_along):
    original, copy = project_root / "original", project_root / "copy"
    original.mkdir()
    (project_root / "mlflow.db").rename(original / "mlflow.db")
    with new_run(original) as before:
        before.log_text("first", "note.txt")
    ignored = shutil.ignore_patterns(*([] if files_come_along else ["mlartifacts"]))
    shutil.copytree(original, copy, ignore=ignored)
    capsys.readouterr()
    with new_run(copy) as after:
        after.log_text("second", "note.txt")
    assert artifacts(copy, after.id) == copy / "mlartifacts" / after.id / "artifacts"
    assert (artifacts(copy, after.id) / "note.txt").read_text() == "second"
    assert [folder.name for folder in (original / "mlartifacts").iterdir()] == [before.id]
    # Where only the store was copied, the first run's files are still found where they are.
    assert artifacts(copy, before.id).is_relative_to(copy if files_come_along else original)
    assert capsys.readouterr().err.count("came here with a copied or moved project") == 1
    linked = project_root / "linked"
    linked.mkdir()
    (linked / "mlflow.db").symlink_to(copy / "mlflow.db")  # one store for two projects, with one place for files
    with new_run(copy), new_run(original), new_run(linked) as run:
        run.log_text("third", "note.txt")
    assert artifacts(linked, run.id).is_relative_to(copy)
    assert "copied" not in capsys.readouterr().err


def test_the_address_of_the_page_of_runs_has_no_doubled_slash():
    page = "http://127.0.0.1:5000/#/experiments/7/runs?compareRunsMode=CHART&workflowType=machine_learning"
    assert ui_address("http://127.0.0.1:5000", "7") == ui_address("http://127.0.0.1:5000/", "7") == page


def test_neither_addresses_nor_errors_show_passwords():
    assert without_credentials("postgresql://me:secret@host/runs?password=secret") == "postgresql://host/runs"
    assert without_credentials("http://me:se@cret@host:5000/path") == "http://host:5000/path"
    assert without_credentials("sqlite:///mlflow.db") == "sqlite:///mlflow.db"
    error = OSError("no answer from http://me:secret@host/path\nmore")
    assert first_line(error) == "OSError: no answer from http://host/path"
