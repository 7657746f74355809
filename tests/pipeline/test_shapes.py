"""Pictures of two shapes, or at two resolutions, through all stages; the model draws both."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from projects import STAGES, Project, stages_run
from stages import copy_project, finish
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.evaluation.metadata import read_metadata

pytestmark = pytest.mark.pipeline

WIDE, SQUARE = (192, 64), (40, 40)  # width, height


@pytest.fixture(scope="module")
def project(make_project) -> Project:
    """A project of 20 wide and 20 square pictures of noise, nothing computed yet."""
    project = make_project("shapes")
    pictures = project.folder / "pictures"
    pictures.mkdir()
    for number in range(40):
        width, height = WIDE if number % 2 else SQUARE
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number:02d}.png")
        (pictures / f"{number:02d}.txt").write_text(f"{'wide' if number % 2 else 'square'} picture")
    params = {"source": "folder", "path": "pictures", "image_size": 32, "bucket_multiple": 16, "max_bucket_ratio": 3.0}
    project.set_params(**{f"ingest__{name}": value for name, value in params.items()})
    return project


def shapes_of(project: Project) -> list[list[int]]:
    return json.loads((project.folder / "models/unet/config.json").read_text())["latent_shapes"]


def sample(*options: str) -> Image.Image:
    result = CliRunner().invoke(app, ["sample", "a picture", "--steps", "2", "-o", "sample.png", *options])
    assert result.exit_code == 0, result.output
    return Image.open("sample.png")


def test_a_model_is_trained_on_two_shapes_and_draws_both(project, monkeypatch):
    project.set_params(ingest__shape="buckets", evaluate__sizes=["32x32", "48x16"], encode_images__flip=True)
    assert stages_run(project.run("dvc", "repro").stdout) == list(STAGES)
    assert shapes_of(project) == [[4, 2, 6], [4, 4, 4]]
    metrics = json.loads((project.folder / "reports/evaluate/metrics.json").read_text())
    assert metrics["held_out_combinations"] == 2
    assert {"val_mae", "held_out_recall_at_1", "copied_share", "memorisation_recall"} <= metrics.keys()

    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    assert sample().size == (32, 32)
    assert sample("--size", "48x16").size == (48, 16)
    assert read_metadata(Path("sample.png")).size == "48x16"


def test_a_model_is_trained_at_two_resolutions_and_draws_both(project, tmp_path, monkeypatch):
    """By the stages alone, which is less than DVC takes."""
    project = copy_project(project, tmp_path / "project")
    project.set_params(ingest__shape="square", ingest__image_size=[32, 64], evaluate__sizes=None)
    for stage in STAGES:
        finish(project, stage)
    assert shapes_of(project) == [[4, 4, 4], [4, 8, 8]]
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    assert sample().size == (32, 32)
    assert sample("--size", "64x64").size == (64, 64)
