"""The model that ships in the package: whole, small, able to draw, and from a commit of this repository."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.ingestion.splits import split_of
from latentloom.params_file import load_params
from latentloom.registry.models import SHOWCASE_FOLDER, find_model, is_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not is_model(SHOWCASE_FOLDER), reason="no model is packed into this package")


def test_it_is_complete_and_at_most_thirty_megabytes():
    names = {path.name for path in SHOWCASE_FOLDER.iterdir()}
    assert names >= {"README.md", "held_out.csv", "metrics.json", "provenance.json", "sampling.json"}
    assert (SHOWCASE_FOLDER / "model.safetensors").stat().st_size <= 30e6
    assert "CC BY-SA 4.0" in (SHOWCASE_FOLDER / "README.md").read_text(encoding="utf-8")


def test_it_draws_by_its_name_a_dark_figure_on_white(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    sample = ["sample", "woman astronaut, medium-dark skin tone", "--model", "showcase", "--steps", "5"]
    result = CliRunner().invoke(app, sample)
    assert result.exit_code == 0, result.output
    with Image.open("samples/sample.png") as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.shape == (128, 128)
    assert np.median([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) > 200
    assert pixels[32:96, 32:96].mean() < 200


def test_what_its_figures_are_of_was_held_out():
    held_out = pd.read_csv(SHOWCASE_FOLDER / "held_out.csv", keep_default_na=False)
    fraction = load_params(ROOT / "presets" / "openmoji.yaml").ingest.val_fraction
    assert {split_of(own_id, fraction) for own_id in held_out["id"]} == {"validation"}
    assert "woman astronaut, medium-dark skin tone" in set(held_out["caption"])


def test_its_lineage_ends_at_a_commit_of_this_repository(tmp_path):
    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no git clone with its history")
    commit = find_model("showcase", tmp_path).provenance.commit
    assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0
    preset = git("show", f"{commit}:presets/openmoji.yaml").stdout
    assert git("show", f"{commit}:params.yaml").stdout == preset != ""
