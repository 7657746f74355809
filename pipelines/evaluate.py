"""Stage `evaluate`: the model's metrics and samples, in reports/evaluate and in the MLflow run of its training."""

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict

import numpy as np

from latentloom.encoding.dataset import load_caches
from latentloom.evaluation.noise_curves import save_noise_curves
from latentloom.evaluation.report import evaluate
from latentloom.evaluation.sweep import CHART, TABLE, save_sweep, sweep
from latentloom.evaluation.text_to_image import SETTINGS_FILE, load_text_to_image
from latentloom.layout import (
    DVC_LOCK,
    EXTREMES_SHEET,
    IMAGES,
    LATENTS,
    MODEL,
    SAMPLE_SHEET,
    TEXT,
    TRAIN_PLOTS,
    project_root,
)
from latentloom.params import Params
from latentloom.registry.models import stored_model
from latentloom.stage import run_stage
from latentloom.tracking.delivery import KEY_TAG
from latentloom.tracking.provenance import read_run_record
from latentloom.tracking.runs import TrackedRun, reopened_run
from latentloom.tracking.store import first_line, open_client


def main(params: Params) -> str:
    model = load_text_to_image(MODEL)
    caches = load_caches(LATENTS, TEXT, device=model.device, memory_share=params.machine.data_memory_share)
    evaluation = evaluate(params, model, caches, IMAGES)
    evaluation.save()
    charts = {
        "sweep": save_sweep(sweep(model, caches, params.evaluate, params.seed)),
        "noise_curves": save_noise_curves(TRAIN_PLOTS),
    }
    with training_run(model.model_sha256) as tracked:
        step = params.train.steps
        tracked.log_metrics({f"evaluate/{name}": value for name, value in evaluation.metrics.items()}, step)
        tracked.log_text(json.dumps(asdict(params.evaluate.sampling), indent=2), SETTINGS_FILE)
        tracked.log_image(np.asarray(evaluation.sheet), "evaluation", step)
        tracked.log_image(np.asarray(evaluation.extremes), "extremes", step)
        tracked.log_metrics({f"evaluate/seconds/{name}": own for name, own in evaluation.seconds.items()}, step)
        if evaluation.encoders:
            tracked.log_text(json.dumps(evaluation.encoders, indent=2), "feature_encoders.json")
        for name, chart in charts.items():
            if chart is not None:
                tracked.log_image(chart, name, step)
        for path in (SAMPLE_SHEET, EXTREMES_SHEET, DVC_LOCK, CHART, TABLE):  # dvc.lock names the model by now
            if path.exists():
                tracked.log_file(path)
    return f"{len(params.evaluate.prompts)} prompts sampled, {evaluation.summary}"


def training_run(model_sha256: str) -> AbstractContextManager[TrackedRun]:
    """The run that trained the model, on this machine or by its hash in MLflow; else one that keeps nothing."""
    root = project_root()
    if (record := read_run_record(root, model_sha256)) and record.run_key:
        return reopened_run(root, record.run_key)
    try:
        run = stored_model(open_client(root), model_sha256).run
    except Exception as error:  # MLflow is away or not installed, which must not fail an evaluation
        run, why = None, first_line(error)
    else:
        why = "no run has its hash"
    if run is None:
        print(f"evaluate: nothing is logged to MLflow: {why}", file=sys.stderr, flush=True)
        return nullcontext(TrackedRun())
    return reopened_run(root, run.data.tags[KEY_TAG])


if __name__ == "__main__":
    run_stage("evaluate", main)
