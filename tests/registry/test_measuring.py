"""In a finished project: a champion of other data is measured again on this project's, and both are compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from projects import Project
from tiny_models import save_tiny_unet
from tracked_runs import share
from typer.testing import CliRunner

from latentloom.cli import app
from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.encoding.codec import LatentCodec
from latentloom.encoding.dataset import load_caches
from latentloom.errors import UserError
from latentloom.layout import LATENTS, MODEL, TEXT
from latentloom.model_files import model_hash, read_config
from latentloom.registry import measuring, registry
from latentloom.registry.figures import RECALLS, Figures, figures_of, sampling_settings
from latentloom.registry.models import stored_model
from latentloom.tracking.evaluations import EVALUATED_TAG
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import open_client

pytestmark = pytest.mark.pipeline


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Project:
    """A copy of the finished project, as the current folder."""
    project = finished.copied(tmp_path / "project")
    monkeypatch.chdir(project.folder)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return project


def keyboard(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_champion_of_other_data_is_measured_again_as_the_stage_measures_and_compared(project, tmp_path):
    other = save_tiny_unet(tmp_path / "other")
    with new_run(project.folder, name="of other data") as run:
        run.set_tags({"model.sha256": model_hash(other), EVALUATED_TAG: model_hash(other)})
        run.log_params({"seed": 0})
        run.log_text(json.dumps({"failed_checks": []}), "provenance.json")
        run.log_dataset(name="mine", source="data/latents", digest="e" * 16, rows=7, context="validation")
        figures = share("held_out_recall_at_1", 1.0, 100) | share("copied_share", 0.0, 100)
        run.log_metrics({f"evaluate/{name}": value for name, value in figures.items()}, 8)
    keyboard("promote", str(other), "--to", "champion")
    assert "version 2 of latentloom is the champion" in keyboard("promote", str(MODEL), "--to", "champion")

    client = open_client(project.folder)
    measured = json.loads(Path("reports/evaluate/metrics.json").read_text())
    stored = stored_model(client, model_hash(MODEL))
    own = figures_of(client, stored)
    assert {name: own.values[name] for name in measured} == pytest.approx(measured)
    tags = client.get_model_version("latentloom", "1").tags
    before, again = Figures.of_tags(tags), Figures.of_tags(tags, registry.REMEASURED)
    assert before.differences(own)
    assert again.differences(own) == []
    assert before.values["held_out_recall_at_1"] == 1.0

    project.set_params(evaluate__prompts=None)  # so captions of the data are sampled
    printed = json.loads(keyboard("compare", "1", "champion", "--json", "-o", "both.png"))
    assert printed["a"]["figures"]["copied_share"] == again.values["copied_share"]
    assert printed["b"]["sha256"] == model_hash(MODEL)
    assert printed["verdict"].startswith("they cannot be told apart: ")  # by two samples
    assert Path(printed["sheet"]).read_bytes().startswith(b"\x89PNG")

    # A model that is measured again on the data that it was measured on has the figures of the stage.
    like = replace(own, values={})
    settings = sampling_settings(client, stored)
    values = measuring.measure_again(MODEL, like, settings, project.folder).values
    assert {name: value for name, value in measured.items() if name in values} == pytest.approx(dict(values))


def test_samples_in_other_units_than_the_caches_are_compared_in_those_of_the_caches(project, monkeypatch):
    caches = load_caches(LATENTS, TEXT)
    held_out, other = caches.validation, LatentCodec([2.0] * 4, [3.0] * 4)

    class KnowsThemAll:
        """Generates each held-out image, in units of its own."""

        codec = other

        def embed(self, captions):
            return captions

        def latents(self, captions, ids, settings, *, seed, shapes):
            rows = torch.tensor([held_out.names().index(own) for own in ids])
            return other.standardise(held_out.codec.destandardise(held_out.latents_at(rows)[0]))

    monkeypatch.setattr(measuring, "load_text_to_image", lambda folder, device: KnowsThemAll())
    like = Figures(data=caches.digests["validation"], samples=len(held_out), seed="0")
    values = measuring.measure_again(MODEL, like, SamplingSettings(), project.folder).values
    recalls = [values[name] for name in RECALLS if name in values]
    assert recalls
    assert set(recalls) == {1.0}
    with pytest.raises(UserError, match=r"hold other data \(\w{16}\) than it was measured on \(f{16}\)"):
        measuring.measure_again(MODEL, replace(like, data="f" * 16), SamplingSettings(), project.folder)
    other_shape = read_config(MODEL).model_copy(update={"latent_shape": (4, 8, 16)})
    monkeypatch.setattr(measuring, "read_config", lambda folder: other_shape)
    with pytest.raises(UserError, match=r"latents of shapes that it was not trained on: \(4, 8, 8\)$"):
        measuring.measure_again(MODEL, like, SamplingSettings(), project.folder)
