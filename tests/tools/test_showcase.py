"""How the model that ships is made of a finished project: rounded, measured, with its card, origin and sheet."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from showcase.figures import check_recall
from showcase.pack import main, pack
from showcase.sheet import draw_sheet
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.errors import UserError
from latentloom.evaluation.sheet import CELL, GAP, LEFT, MARGIN
from latentloom.ingestion.shards import iterate_images, read_metadata
from latentloom.ingestion.splits import split_of
from latentloom.model_files import model_hash
from latentloom.registry.models import find_model

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    """The folder that is made of a project; its sheet lies beside it."""
    folder = tmp_path_factory.mktemp("package") / "showcase"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTLOOM_DEVICE", "cpu")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        main(finished.folder, folder, folder.parent / "sheet.png", shared=False)
    return folder


def test_parameters_are_rounded_to_fp16_and_the_measured_whitening_is_as_it_was(finished, packed):
    trained = load_file(finished.folder / "models/unet/model.safetensors")
    shipped = load_file(packed / "model.safetensors")
    assert trained.keys() == shipped.keys()
    for name, own in shipped.items():
        assert own.dtype is (torch.float32 if name.startswith("text_whitening.") else torch.float16)
        assert torch.equal(own, trained[name].to(own.dtype))


def test_its_provenance_names_the_commit_and_the_data_and_nothing_of_the_machine(finished, packed):
    own, record = json.loads((packed / "provenance.json").read_text()), finished.run_record()
    assert own["model_sha256"] == model_hash(packed)
    assert own["converted_from"] == record["model_sha256"]
    assert own["commit"] == finished.run("git", "rev-list", "--max-parents=0", "HEAD").stdout.strip()
    assert own["outs"] == {path: out for path, out in record["outs"].items() if path != "models/unet"}
    assert not any(own[name] for name in ("user", "branch", "mlflow_run_id", "run_key"))
    assert find_model(str(packed), packed).provenance.commit == own["commit"]


def test_its_figures_are_those_of_the_evaluation_of_what_was_held_out(finished, packed):
    metrics = json.loads((packed / "metrics.json").read_text())
    evaluated = json.loads((finished.folder / "reports/evaluate/metrics.json").read_text())
    assert metrics["as_trained"].items() >= evaluated.items()
    counts = ("held_out_combinations", "new_words_captions")
    assert [metrics["figures"][name] for name in counts] == [evaluated[name] for name in counts]
    assert metrics["rounding"]["pixel_difference"] < 0.02
    assert metrics["training"]["seconds"] >= 0
    held_out = pd.read_csv(packed / "held_out.csv")
    assert {split_of(own_id, 0.2) for own_id in held_out["id"]} == {"validation"}
    card = (packed / "README.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "OpenMoji (https://openmoji.org)" in card
    assert "$" not in card


@pytest.fixture
def two_held_out(finished, packed, tmp_path):
    """The folder, as if two pictures of the project had been held out as combinations; and their rows."""
    folder = Path(shutil.copytree(packed, tmp_path / "showcase"))
    rows = read_metadata(finished.folder / "data/images").head(2)
    rows = rows.assign(caption=[captions[0] for captions in rows["captions"]], combination=True)
    rows[["id", "key", "caption", "combination"]].to_csv(folder / "held_out.csv", index=False)
    return folder, rows


def test_its_sheet_shows_the_real_pictures_above_what_sample_draws(finished, two_held_out, monkeypatch):
    folder, rows = two_held_out
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    sheet = np.asarray(draw_sheet(folder))
    real = dict(iterate_images(finished.folder / "data/images", wanted=set(rows["id"])))
    for column, row in enumerate(rows.itertuples()):
        command = ["sample", row.caption, "--model", str(folder), "-o", str(folder / "one.png")]
        monkeypatch.chdir(folder)  # without params.yaml: the model's own settings
        assert CliRunner().invoke(app, command).exit_code == 0
        with Image.open(folder / "one.png") as drawn:
            expected = [Image.fromarray(real[row.id]), drawn.convert("RGB")]
            cells = [np.asarray(own.resize((CELL, CELL), Image.Resampling.LANCZOS)) for own in expected]
        left = LEFT + column * (CELL + GAP)
        for number, cell in enumerate(cells):
            top = MARGIN + 32 + number * (CELL + 4)
            np.testing.assert_array_equal(sheet[top : top + CELL, left : left + CELL], cell)


def test_a_picture_that_is_not_the_one_that_was_held_out_is_an_error(two_held_out):
    folder, rows = two_held_out
    rows.assign(key=rows["key"].iloc[::-1].tolist()).to_csv(folder / "held_out.csv", index=False)
    with pytest.raises(UserError, match=rows["key"].iloc[1]):
        draw_sheet(folder)


def test_what_was_not_trained_from_a_commit_or_not_at_all_is_not_packed(finished, tmp_path):
    project = tmp_path / "project"
    for part in ("models", ".state/runs"):
        shutil.copytree(finished.folder / part, project / part)
    shutil.copy2(finished.folder / "params.yaml", project)
    (record,) = (project / ".state/runs").iterdir()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"dirty": True}))
    with pytest.raises(UserError, match="did not start from a commit"):
        pack(project, tmp_path / "showcase")
    shutil.rmtree(project / "models")
    with pytest.raises(UserError, match="dvc repro"):
        pack(project, tmp_path / "showcase")
    assert not (tmp_path / "showcase").exists()


def test_a_recall_that_rounding_changes_is_an_error():
    shipped = {"held_out_recall_at_1": 0.5, "held_out_recall_at_1_low": 0.4, "held_out_recall_at_1_high": 0.6}
    check_recall(shipped, {"held_out_recall_at_1": 0.6})
    with pytest.raises(UserError, match="does not bear rounding"):
        check_recall(shipped, {"held_out_recall_at_1": 0.61})
