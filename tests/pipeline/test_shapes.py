"""Pictures of two shapes at two resolutions through all stages, and a model that draws both."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from projects import STAGES
from stages import finish
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.evaluation.metadata import read_metadata

pytestmark = pytest.mark.pipeline


def test_a_model_is_trained_on_two_shapes_at_two_resolutions_and_draws_both(make_project, monkeypatch):
    """By the stages alone: DVC takes as long again."""
    project = make_project("shapes")
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    Path("pictures").mkdir()
    for number in range(40):
        width, height, kind = (192, 64, "wide") if number % 2 else (40, 40, "square")
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"pictures/{number:02d}.png")
        Path(f"pictures/{number:02d}.txt").write_text(f"{kind} picture")
    params = {"source": "folder", "path": "pictures", "shape": "buckets", "bucket_multiple": 16, "image_size": [32, 64]}
    params |= {"val_fraction": 0.4, "near_duplicate_distance": None}  # all noise is alike
    project.set_params(**{f"ingest__{name}": value for name, value in params.items()})
    project.set_params(encode_images__flip=True, evaluate__sizes=["32x32", "96x48"])

    said = {stage: finish(project, stage) for stage in STAGES}
    assert "40 images" in said["ingest"] and "80 latents" in said["encode_images"]
    config = json.loads(Path("models/unet/config.json").read_text())
    assert (config["latent_shape"], config["latent_shapes"]) == ([4, 4, 4], [[4, 4, 4], [4, 6, 12]])
    metrics = json.loads(Path("reports/evaluate/metrics.json").read_text())
    assert metrics["held_out_combinations"] == 2
    assert {"val_mae", "held_out_recall_at_1", "copied_share", "memorisation_recall"} <= metrics.keys()

    for options, size in (([], (32, 32)), (["--size", "96x48"], (96, 48))):
        sampled = CliRunner().invoke(app, ["sample", "a picture", "--steps", "2", "-o", "sample.png", *options])
        assert (sampled.exit_code, sampled.stderr) == (0, "")
        with Image.open("sample.png") as image:
            assert image.size == size
    assert read_metadata(Path("sample.png")).size == "96x48"
