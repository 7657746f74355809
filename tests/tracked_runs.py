"""A project's root with a store, and runs of tiny models in it, as trainings and evaluations leave them."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from read_once import read_migrations_once
from tiny_models import save_tiny_unet

from latentloom.diffusion.sampling_settings import SamplingSettings
from latentloom.evaluation.recall import with_interval
from latentloom.model_files import model_hash
from latentloom.tracking.delivery import KEY_TAG
from latentloom.tracking.evaluations import EVALUATED_TAG, STEP
from latentloom.tracking.provenance import HASH_TAG
from latentloom.tracking.runs import new_run
from latentloom.tracking.store import open_client


@pytest.fixture(scope="session")
def empty_store(made_once) -> Path:
    """A fresh SQLite store: MLflow needs seconds to make one, so each test gets a copy."""
    read_migrations_once()

    def make(folder: Path) -> str:
        folder.mkdir()
        open_client(folder)
        return ""

    return made_once("empty_store", make)[0] / "mlflow.db"


@pytest.fixture(scope="session")
def tiny_unets(tmp_path_factory) -> list[Path]:
    """Three models that differ in their weights."""
    folder = tmp_path_factory.mktemp("unets")
    return [save_tiny_unet(folder / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture
def project_root(tmp_path, empty_store, monkeypatch) -> Path:
    """The current folder, as a project's root with an empty store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LATENTLOOM_DEVICE", "cpu")
    with closing(sqlite3.connect(empty_store)) as made, closing(sqlite3.connect(tmp_path / "mlflow.db")) as copy:
        made.backup(copy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(project_root) -> Callable[..., str]:
    """``train(folder, recall=..., ...)`` logs the runs of a model, as `train` and `evaluate` do; the training's id."""

    def log(
        folder: Path,
        *,
        name: str = "a run",
        recall: float | None = 0.5,
        copied: float = 0.0,
        val_mae: float | None = 0.4,
        data: str = "d" * 16,
        noise_levels: str = "cosine",
        failed_checks: tuple[str, ...] | None = (),
        provenance: dict | None = None,
        tags: dict[str, str] | None = None,
        code_diff: str = "",
        params: dict | None = None,
    ) -> str:
        known = {"failed_checks": None if failed_checks is None else list(failed_checks)} | (provenance or {})
        settings = SamplingSettings(diffusion_steps=4, class_guidance=2.5, precision="fp32")
        with new_run(project_root, name=name) as run:
            run.set_tags({HASH_TAG: model_hash(folder)} | (tags or {}))
            run.log_text(json.dumps(known), "provenance.json")
            run.log_params(params or {})
            if code_diff:
                run.log_text(code_diff, "code.diff")
        figures = {} if val_mae is None else {"val_mae": val_mae}
        if recall is not None:
            figures |= share("held_out_recall_at_1", recall, 100) | share("copied_share", copied, 100)
            figures |= {"held_out_combinations": 100, "new_words_captions": 0}
        given = {"name": "mine-validation", "source": "data/latents", "digest": data, "rows": 7}
        with new_run(project_root, name=f"{name}, evaluated", parent=(KEY_TAG, run.key)) as evaluation:
            evaluation.set_tags({EVALUATED_TAG: model_hash(folder)})
            evaluation.log_params({"seed": 0, "diffusion": {"schedule": "vp", "noise_levels": noise_levels}})
            evaluation.log_dataset(context="validation", **given)
            evaluation.log_metrics({f"evaluate/{key}": value for key, value in figures.items()}, STEP)
            evaluation.log_text(json.dumps(asdict(settings)), "sampling.json")
        return run.id

    return log


def share(name: str, value: float, samples: int) -> dict[str, float]:
    """A share of so many samples, with its interval, as `evaluate` measures it."""
    return with_interval(name, np.arange(samples) < round(value * samples))
