"""What a finished pipeline leaves for the person who ran it."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

pytestmark = pytest.mark.pipeline


def read(project, path):
    return json.loads((project.folder / path).read_text())


def test_every_stage_says_in_one_line_what_it_did(first_run):
    _, output = first_run
    for stage, words in {
        "ingest": "40 images",
        "encode_images": "40 latents: encoded 40, reused 0",
        "encode_text": "captions: encoded",
        "validate": "checks passed on 40 images",
        "train": "8 steps on",
        "evaluate": "memorisation_recall",
    }.items():
        (line,) = [line for line in output.splitlines() if line.startswith(f"{stage}: ")]
        assert words in line
        assert line.endswith(" s)")


def test_the_sheet_and_the_figures_are_there(finished):
    with Image.open(finished.folder / "reports/evaluate/samples.png") as sheet:
        assert sheet.width > 1000
    metrics = read(finished, "reports/evaluate/metrics.json")
    assert 0 <= metrics["memorisation_recall"] <= 1
    assert metrics["training_captions"] == 4
    # The same weights, read back from the disk, err by the same: training and evaluation agree.
    curve = pd.read_csv(finished.folder / "reports/train/plots/validation.csv")
    assert metrics["val_mae"] == pytest.approx(curve["val_mae"].iloc[-1], rel=1e-3)
    summary = finished.run("latentloom", "summary").stdout
    assert "reports/evaluate/samples.png" in summary


def test_the_attribution_travels_from_the_source_to_the_model(finished):
    for path in ("data/images/manifest.json", "data/latents/stats.json", "models/unet/config.json"):
        described = read(finished, path)
        assert "OpenMoji" in described["attribution"]
        assert described["licence"] == "CC BY-SA 4.0"


def test_the_encoders_size_flows_into_the_model(finished):
    assert read(finished, "models/unet/config.json")["text_dim"] == read(finished, "data/text/stats.json")["dim"] == 384


def test_rejected_images_are_listed_with_a_reason(finished):
    rejects = pd.read_parquet(finished.folder / "data/rejects.parquet")
    assert list(rejects.columns) == ["source", "key", "reason", "detail", "preview"]
    report = read(finished, "reports/ingest.json")
    assert report["found"] == report["kept"] + report["rejected"]
    assert len(rejects) == report["rejected"]


def test_validation_left_json_and_pages(finished):
    report = read(finished, "reports/validation.json")
    assert report["success"] is True
    assert (finished.folder / "reports/data_docs/index.html").exists()


def test_dvc_shows_metrics_and_renders_plots(finished, tmp_path):
    metrics = json.loads(finished.run("dvc", "metrics", "show", "--json").stdout)
    shown = str(metrics)
    for name in ("train_mae", "val_mae", "memorisation_recall"):
        assert name in shown
    finished.run("dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    page = (tmp_path / "plots" / "index.html").read_text()
    for title in ("Mean absolute error on training images", "Mean absolute error on held-out images"):
        assert title in page
    assert "samples.png" in page


def test_mlflow_has_the_training_with_curves_pictures_data_and_tags_and_its_evaluation_below(finished, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = MlflowClient(f"sqlite:///{finished.folder / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "latentloom"]
    evaluation, run = client.search_runs([experiment.experiment_id])  # the newest first
    assert run.info.run_id == finished.run_record()["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/mae")] == [2, 4, 6, 8]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "val/mae")] == [4, 8]
    bins = [name for name in run.data.metrics if name.startswith("val/mae_noise_")]
    assert len(bins) >= 3
    assert all(name.replace("val/", "train/") in run.data.metrics for name in bins)
    assert {"train/learning_rate", "train/images_per_second"} <= run.data.metrics.keys()
    assert evaluation.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert evaluation.data.tags["evaluated.model.sha256"] == run.data.tags["model.sha256"]
    assert "evaluate/memorisation_recall" in evaluation.data.metrics
    assert not run.data.metrics.keys() & evaluation.data.metrics.keys()
    pictures = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]
    assert sum(path.startswith("images/samples") and path.endswith(".png") for path in pictures) == 2
    assert sum(path.startswith("images/final_samples") and path.endswith(".png") for path in pictures) == 1
    assert run.data.params["train.learning_rate"] == "0.004"
    assert run.data.params["ingest.source"] == "openmoji"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert run.data.tags["git.dirty"] in ("true", "false")
    assert len(run.data.tags["model.sha256"]) == 64
    datasets = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert datasets.keys() == {"training", "validation"}
    assert len(datasets["training"].digest) == 16


def test_a_latent_is_read_as_the_page_about_the_caches_shows(finished):
    page = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert finished.run("python", "-c", f"{example}\nprint(latent.shape)").stdout.strip() == "(4, 8, 8)"


def test_the_page_about_the_caches_names_every_file_of_theirs(finished):
    page = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()
    for cache in ("latents", "text"):
        for path in (finished.folder / "data" / cache).iterdir():
            assert f"data/{cache}/{path.name}" in page
