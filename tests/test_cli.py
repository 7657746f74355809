"""The command line: checks params, shows what a run left, and says what the user can fix."""

import errno
import importlib
import json
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from tiny_models import save_tiny_unet
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.tracking.runs import new_run

ROOT = Path(__file__).parents[1]


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_a_good_params_file_passes_silently(invoke):
    result = invoke("check", str(ROOT / "params.yaml"))
    assert (result.exit_code, result.output) == (0, "")


SOURCE = r"source: openmoji(.*)\n +path: *"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"shape: square": "shape: buckets", "image_size: 128": "image_size: [128, 192]"},
            "ingest.image_size 128: 96x192, 96x160, 128x128, 160x96, 192x96\n"
            "ingest.image_size 192: 128x256, 160x224, 192x192, 224x160, 256x128\n",
        ),
        ({SOURCE: "source: folder\n  path: memory://checked "}, "memory://checked: 1 files, 4 bytes\n"),
        ({SOURCE: "source: huggingface\n  path: owner/name "}, f"owner/name: commit {'1' * 40}\n"),
    ],
)
def test_a_params_file_shows_its_several_sizes_and_its_sources_elsewhere(invoke, tmp_path, monkeypatch, changes, shown):
    fsspec.filesystem("memory").pipe_file("/checked/a.png", b"four")
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha="1" * 40))
    params = (ROOT / "params.yaml").read_text()
    for wanted, given in changes.items():
        params = re.sub(wanted, given, params)
    (tmp_path / "params.yaml").write_text(params)
    assert invoke("check").output == shown


def test_a_bad_params_file_is_rejected(invoke, tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    result = invoke("check")
    assert result.exit_code == 1
    assert "train: missing" in result.output


def test_a_folder_by_the_name_of_a_params_file_is_an_error_of_one_line(invoke, tmp_path):
    (tmp_path / "params.yaml").mkdir()
    result = invoke("check")
    assert (result.exit_code, result.output) == (1, "params.yaml cannot be read: Is a directory\n")


def test_the_summary_names_the_sheet_the_figures_and_mlflow_and_before_a_run_what_to_do(invoke, tmp_path):
    result = invoke("summary")
    assert (result.exit_code, "run `dvc repro`" in result.output) == (1, True)
    for stage, figures in (
        ("train", {"train_mae": 0.1234}),
        ("evaluate", {"val_mae": 0.5, "held_out_recall_at_1": 1.0}),
    ):
        folder = tmp_path / "reports" / stage
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(figures))
    output = invoke("summary").output
    for part in (
        "reports/evaluate/samples.png",
        "held_out_recall_at_1 1",
        "val_mae 0.5",
        "train_mae 0.1234",
        "make ui",
    ):
        assert part in output


def test_the_page_without_gradio_says_what_brings_it(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in ("layout", "local"):
        monkeypatch.delitem(sys.modules, f"latentloom.page.{module}", raising=False)
    result = invoke("page")
    assert result.exit_code == 1
    assert (
        'the page needs Gradio, which is not installed: `make page`, or pip install "latentloom[page]"' in result.output
    )


@pytest.mark.slow
def test_syncing_delivers_what_waits_and_then_has_nothing_to_do(invoke, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="MLflow could not be written to"), new_run(tmp_path) as run:
        run.log_metrics({"train/mae": 1.0}, 1)
    result = invoke("sync")
    assert (result.exit_code, result.output.startswith(f"{run.key}: 3 entries still wait: ")) == (1, True)

    store = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    about = tmp_path / ".state" / "tracking" / run.key / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"target": store}))
    result = invoke("sync")
    assert (result.exit_code, result.output) == (0, f"{run.key}: delivered 3 entries\n")
    assert invoke("sync").output == ""


@pytest.mark.parametrize(
    "command",
    ["history", "ui", "lineage", "compare a b", "promote x --to champion", "demote --from champion", "sample x"],
)
def test_outside_a_project_no_store_is_created(invoke, tmp_path, monkeypatch, command):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    result = invoke(*command.split())
    assert result.exit_code == 1
    assert "in the project's root" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["history", "sample apple --model champion", "promote x --to champion"])
@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + bytes(200)])
def test_a_damaged_store_is_one_sentence_that_names_it(invoke, tmp_path, monkeypatch, command, damage):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "mlflow.db").write_bytes(damage)
    result = invoke(*command.split())
    assert result.exit_code == 1
    assert result.output.startswith(f"sqlite:///{tmp_path}/mlflow.db cannot be used: ")
    assert len(result.output.splitlines()) == 1


def test_the_ui_ends_with_a_sentence_where_the_port_asked_for_is_taken_and_else_takes_the_next(invoke, monkeypatch):
    started = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("latentloom.tracking.store.existing_store", lambda root: None)
    monkeypatch.setattr("latentloom.tracking.store.experiment_id", lambda client, root: "1")
    monkeypatch.setattr("os.execve", lambda program, command, environment: started.append(command))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        result = invoke("ui", "--port", str(taken))
        assert (result.exit_code, result.output.count("\n"), started) == (1, 1, [])
        assert f"port {taken} cannot be used: another program listens there" in result.output
        monkeypatch.setattr("latentloom.cli.UI_PORTS", range(taken, taken + 20))
        printed = invoke("ui").output
    (command,) = started
    port = command[command.index("--port") + 1]
    assert int(port) > taken
    assert printed.startswith(f"MLflow: http://127.0.0.1:{port}/#/experiments/1/")
    assert command[-2:] == ["--workers", "1"]  # MLflow starts several again and again, whatever they end of


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 122] Disk quota exceeded")]),  # as a copied folder says it
    ],
)
def test_a_full_disk_is_one_sentence_whatever_library_notices_it(invoke, monkeypatch, error):
    def fail(root):
        raise error

    monkeypatch.setattr("latentloom.registry.registry.history", fail)
    result = invoke("history")
    assert result.exit_code == 1
    assert re.fullmatch(r"(No space left on device|Disk quota exceeded), in .*: make room, .*\n", result.output)


def test_a_database_whose_driver_is_not_installed_is_one_sentence(invoke, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mysql+absent://me:secret@127.0.0.1/runs")
    monkeypatch.setattr("latentloom.tracking.store.open_client", lambda root: importlib.import_module("no_driver"))
    result = invoke("history")
    assert result.exit_code == 1
    sentence = "mysql+absent://127.0.0.1/runs cannot be opened: No module named 'no_driver'; install that in this"
    assert result.output.startswith(sentence)


def test_a_bug_shows_its_traceback_and_a_wrong_setting_does_not(invoke, monkeypatch, tmp_path):
    model = save_tiny_unet(tmp_path / "models/unet")
    result = invoke("sample", "an apple", "--steps", "1")
    assert (result.exit_code, "diffusion_steps = 1" in result.output) == (1, True)

    def bug(*arguments, **more):
        raise ValueError("a bug")

    monkeypatch.setattr("latentloom.evaluation.text_to_image.load_text_to_image", bug)
    assert isinstance(invoke("sample", "an apple", "--model", str(model)).exception, ValueError)
