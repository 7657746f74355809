"""The command line: checks params, and tells what a run left."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentloom.cli import app

ROOT = Path(__file__).parents[1]


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_a_good_params_file_passes_silently(invoke):
    result = invoke("check", str(ROOT / "params.yaml"))
    assert (result.exit_code, result.output) == (0, "")


def test_a_bad_params_file_is_told(invoke, tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    result = invoke("check")
    assert result.exit_code == 1
    assert "train: missing" in result.output


def test_the_summary_names_the_sheet_the_figures_and_mlflow(invoke, tmp_path):
    for stage, figures in (
        ("train", {"train_mae": 0.1234}),
        ("evaluate", {"val_mae": 0.5, "caption_recall_at_1": 1.0}),
    ):
        folder = tmp_path / "reports" / stage
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(figures))
    output = invoke("summary").output
    for part in ("reports/evaluate/samples.png", "caption_recall_at_1 1", "val_mae 0.5", "train_mae 0.1234", "make ui"):
        assert part in output


def test_before_the_first_run_the_summary_says_what_to_do(invoke):
    result = invoke("summary")
    assert result.exit_code == 1
    assert "run `make repro`" in result.output
